//! Sockets: accepting, cutting frames, answering in order.
pub mod connection;
pub mod listener;
