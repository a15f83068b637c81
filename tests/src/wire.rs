//! One connection that speaks Kafka's protocol with `kafka-protocol`'s own codecs, in any version.
//!
//! Blocking, one request at a time; for tests that look at single answers. It believes the broker under test no more
//! than it has to: every answer must be a whole frame with the request's correlation id and decode to its end.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use bytes::{Buf, BufMut, Bytes, BytesMut};
use flumen_protocol::record::BatchBuilder;
use kafka_protocol::messages::produce_request::{PartitionProduceData, TopicProduceData};
use kafka_protocol::messages::{ApiKey, ProduceRequest, RequestHeader, ResponseHeader, TopicName};
use kafka_protocol::protocol::{Decodable, Encodable, Request, StrBytes};

/// No answer of a test is larger.
const ANSWER_BYTES_MAX: usize = 256 << 20;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NoAnswer;

impl std::fmt::Display for NoAnswer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("no answer")
    }
}

impl std::error::Error for NoAnswer {}

pub struct Wire {
    stream: TcpStream,
    correlation_id: i32,
    pub client_id: &'static str,
}

impl Wire {
    pub fn connect(address: &str) -> anyhow::Result<Wire> {
        let stream = TcpStream::connect(address).with_context(|| format!("cannot connect to {address}"))?;
        stream.set_nodelay(true)?;
        Ok(Wire { stream, correlation_id: 0, client_id: "wire" })
    }

    /// Sends a request and decodes its answer.
    pub fn ask<Q: Request>(&mut self, version: i16, request: &Q) -> anyhow::Result<Q::Response> {
        self.send(version, request)?;
        self.receive::<Q>(version)
    }

    /// Gives up on an answer after this long, as [`NoAnswer`].
    pub fn set_patience(&mut self, patience: Option<Duration>) -> anyhow::Result<()> {
        Ok(self.stream.set_read_timeout(patience)?)
    }

    pub fn send<Q: Request>(&mut self, version: i16, request: &Q) -> anyhow::Result<()> {
        let frame = self.frame(version, request)?;
        self.stream.write_all(&frame)?;
        Ok(())
    }

    /// The request as it goes out, length first; counts as sent.
    pub fn frame<Q: Request>(&mut self, version: i16, request: &Q) -> anyhow::Result<BytesMut> {
        self.correlation_id += 1;
        let key = ApiKey::try_from(Q::KEY).map_err(|()| anyhow::anyhow!("API key {} is unknown", Q::KEY))?;
        let header = RequestHeader::default()
            .with_request_api_key(Q::KEY)
            .with_request_api_version(version)
            .with_correlation_id(self.correlation_id)
            .with_client_id(Some(StrBytes::from_static_str(self.client_id)));
        let mut frame = BytesMut::new();
        frame.put_i32(0);
        header.encode(&mut frame, key.request_header_version(version))?;
        request.encode(&mut frame, version).with_context(|| format!("{key:?} v{version}"))?;
        let length = i32::try_from(frame.len() - 4)?;
        frame[..4].copy_from_slice(&length.to_be_bytes());
        Ok(frame)
    }

    pub fn send_raw(&mut self, bytes: &[u8]) -> anyhow::Result<()> {
        self.stream.write_all(bytes)?;
        Ok(())
    }

    pub fn receive<Q: Request>(&mut self, version: i16) -> anyhow::Result<Q::Response> {
        self.receive_or_closed::<Q>(version)?.context("the broker closed the connection")
    }

    /// As `receive`; `None` when the broker closed the connection instead.
    pub fn receive_or_closed<Q: Request>(&mut self, version: i16) -> anyhow::Result<Option<Q::Response>> {
        let key = ApiKey::try_from(Q::KEY).map_err(|()| anyhow::anyhow!("API key {} is unknown", Q::KEY))?;
        let Some(mut frame) = self.receive_frame()? else { return Ok(None) };
        let header = ResponseHeader::decode(&mut frame, key.response_header_version(version))?;
        ensure!(
            header.correlation_id == self.correlation_id,
            "{key:?} v{version}: answer to request {} came for {}",
            header.correlation_id,
            self.correlation_id
        );
        let response = Q::Response::decode(&mut frame, version)
            .with_context(|| format!("answer to {key:?} v{version}"))?;
        ensure!(!frame.has_remaining(), "{key:?} v{version}: {} bytes after the answer", frame.len());
        Ok(Some(response))
    }

    /// The next answer without its length; `None` when the broker closed the connection instead.
    pub fn receive_frame(&mut self) -> anyhow::Result<Option<Bytes>> {
        let mut length = [0; 4];
        match self.stream.read_exact(&mut length) {
            Ok(()) => {}
            Err(e) if matches!(e.kind(), ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset) => {
                return Ok(None);
            }
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                return Err(NoAnswer.into());
            }
            Err(e) => return Err(e.into()),
        }
        let length = usize::try_from(i32::from_be_bytes(length))?;
        if length > ANSWER_BYTES_MAX {
            bail!("an answer of {length} bytes");
        }
        let mut frame = vec![0; length];
        self.stream.read_exact(&mut frame)?;
        Ok(Some(frame.into()))
    }
}

pub fn text(value: &str) -> StrBytes {
    StrBytes::from_string(value.to_string())
}

pub fn topic_name(value: &str) -> TopicName {
    TopicName(text(value))
}

/// One batch of these values, without keys.
pub fn batch(values: &[&str], fill: impl FnOnce(&mut BatchBuilder)) -> Bytes {
    let mut builder = BatchBuilder::new();
    fill(&mut builder);
    for value in values {
        builder.append(now_ms(), None, Some(value.as_bytes()), &[]);
    }
    builder.build(0).freeze()
}

/// A produce of one batch to one partition, by name.
pub fn produce(topic: &str, partition: i32, acks: i16, records: Option<Bytes>) -> ProduceRequest {
    ProduceRequest::default().with_acks(acks).with_timeout_ms(30_000).with_topic_data(vec![
        TopicProduceData::default().with_name(topic_name(topic)).with_partition_data(vec![
            PartitionProduceData::default().with_index(partition).with_records(records),
        ]),
    ])
}

pub fn now_ms() -> i64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |d| i64::try_from(d.as_millis()).unwrap_or(i64::MAX))
}
