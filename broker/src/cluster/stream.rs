//! The two kinds of connection between brokers, plain and TLS, with one face.
//!
//! The plain kind is tokio's own halves, and is written to by vectored writes without a copy (`write_ready`); it pays nothing
//! for the other kind but a branch per call. The TLS kind takes what a frame consists of as slices and encrypts it in records of
//! 16 KiB. Both may be taken apart on the thread that accepted them and put together on that of the shard that serves them
//! (`Detached`). What is trusted, `tls` decides.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf, ReadHalf, WriteHalf};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::time::timeout;
use tokio_rustls::TlsStream;

use super::tls::RpcTls;
use super::wire::{LinkError, STALL_MAX};
use crate::net::connection::{advance, write_ready};

/// Slices encrypted in one go; a frame of Raft has two for each entry.
const TLS_SLICES_MAX: usize = 64;

pub enum Reads {
    Plain(OwnedReadHalf),
    Tls(ReadHalf<TlsStream<Socket>>),
}

pub enum Writes {
    Plain(OwnedWriteHalf),
    Tls(WriteHalf<TlsStream<Socket>>),
}

pub struct Stream {
    pub reads: Reads,
    pub writes: Writes,
}

/// A connection that belongs to no thread's runtime.
pub enum Detached {
    Plain(std::net::TcpStream),
    /// The socket is not in the stream as long as this lasts.
    Tls(std::net::TcpStream, Box<TlsStream<Socket>>),
}

impl Reads {
    /// 0 when the other side has closed.
    pub async fn read(&mut self, input: &mut BytesMut) -> io::Result<usize> {
        match self {
            Reads::Plain(half) => half.read_buf(input).await,
            Reads::Tls(half) => match half.read_buf(input).await {
                // Closed without TLS's last word, which brokers do not say: frames carry their lengths themselves.
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(0),
                read => read,
            },
        }
    }
}

impl Writes {
    /// Writes everything, or fails.
    pub async fn write(&mut self, batch: &mut VecDeque<Bytes>) -> Result<(), LinkError> {
        match self {
            Writes::Plain(half) => loop {
                match write_ready(half, batch) {
                    Ok(()) => return Ok(()),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        timeout(STALL_MAX, half.writable()).await.map_err(|_| LinkError::Stalled)??;
                    }
                    Err(error) => return Err(error.into()),
                }
            },
            Writes::Tls(half) => {
                while let Some(front) = batch.front_mut() {
                    if front.is_empty() {
                        batch.pop_front();
                        continue;
                    }
                    let mut slices = [IoSlice::new(&[]); TLS_SLICES_MAX];
                    let mut count = 0;
                    for (slot, bytes) in slices.iter_mut().zip(batch.iter()) {
                        *slot = IoSlice::new(bytes);
                        count += 1;
                    }
                    let taken = timeout(STALL_MAX, half.write_vectored(&slices[..count]));
                    match taken.await.map_err(|_| LinkError::Stalled)?? {
                        0 => return Err(io::Error::from(io::ErrorKind::WriteZero).into()),
                        taken => advance(batch, taken),
                    }
                }
                timeout(STALL_MAX, half.flush()).await.map_err(|_| LinkError::Stalled)??;
                Ok(())
            }
        }
    }
}

impl Stream {
    pub fn plain(stream: TcpStream) -> Stream {
        let (reads, writes) = stream.into_split();
        Stream { reads: Reads::Plain(reads), writes: Writes::Plain(writes) }
    }

    pub fn tls(stream: TlsStream<Socket>) -> Stream {
        let (reads, writes) = tokio::io::split(stream);
        Stream { reads: Reads::Tls(reads), writes: Writes::Tls(writes) }
    }

    /// Connects to a broker. With certificates, both sides have shown theirs when this returns, though the other side may
    /// still say that it does not take this one's: with the first read.
    pub async fn connect(address: &str, tls: Option<&RpcTls>) -> Result<Stream, LinkError> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        match tls {
            None => Ok(Stream::plain(stream)),
            Some(tls) => tls.connect(stream, address).await.map(Stream::tls),
        }
    }

    pub fn detach(self) -> io::Result<Detached> {
        let apart = || io::Error::other("halves of two connections");
        match (self.reads, self.writes) {
            (Reads::Plain(reads), Writes::Plain(writes)) => {
                Ok(Detached::Plain(reads.reunite(writes).map_err(|_| apart())?.into_std()?))
            }
            (Reads::Tls(reads), Writes::Tls(writes)) if reads.is_pair_of(&writes) => {
                let mut stream = Box::new(reads.unsplit(writes));
                let socket = stream.get_mut().0.0.take().ok_or_else(apart)?;
                Ok(Detached::Tls(socket.into_std()?, stream))
            }
            _ => Err(apart()),
        }
    }
}

impl Detached {
    pub fn peer_addr(&self) -> io::Result<SocketAddr> {
        let (Detached::Plain(socket) | Detached::Tls(socket, _)) = self;
        socket.peer_addr()
    }

    /// From here on it belongs to the runtime of this thread.
    pub fn attach(self) -> io::Result<Stream> {
        match self {
            Detached::Plain(socket) => Ok(Stream::plain(TcpStream::from_std(socket)?)),
            Detached::Tls(socket, mut stream) => {
                stream.get_mut().0.0 = Some(TcpStream::from_std(socket)?);
                Ok(Stream::tls(*stream))
            }
        }
    }
}

/// A socket that can be taken out of the TLS around it, and put back.
pub struct Socket(Option<TcpStream>);

impl Socket {
    pub fn new(stream: TcpStream) -> Socket {
        Socket(Some(stream))
    }

    fn with<T>(
        &mut self,
        act: impl FnOnce(Pin<&mut TcpStream>) -> Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        match &mut self.0 {
            Some(stream) => act(Pin::new(stream)),
            None => Poll::Ready(Err(io::ErrorKind::NotConnected.into())),
        }
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.with(|stream| stream.poll_read(context, buffer))
    }
}

impl AsyncWrite for Socket {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.with(|stream| stream.poll_write(context, bytes))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.with(|stream| stream.poll_write_vectored(context, slices))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.with(|stream| stream.poll_flush(context))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.with(|stream| stream.poll_shutdown(context))
    }
}
