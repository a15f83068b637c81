//! Frames: the header, cutting them out of what a connection brings, and those that are not Raft's.

use bytes::{Buf, Bytes, BytesMut};

use flumen_raft::MEMBERS_MAX;

use crate::hello::{Hello, Refusal};
use crate::raft_frame::RaftFrame;
use crate::wire::{DecodeError, Reader, Writer};

pub const HEADER_BYTES: usize = 16;
const MAGIC: [u8; 4] = *b"FLPR";

/// Before the hello, when nobody knows who speaks.
pub const HELLO_BODY_MAX: usize = 4 << 10;
/// One record batch may be as large as the log takes, and a frame carries at least one.
pub const BODY_MAX: usize = 64 << 20;

const KIND_HELLO: u8 = 1;
const KIND_REFUSAL: u8 = 2;
const KIND_ALIVE: u8 = 3;
const KIND_RAFT: u8 = 4;
const KIND_CATCH_UP: u8 = 5;
const KIND_REQUEST: u8 = 6;
const KIND_ANSWER: u8 = 7;
const KIND_LEADS: u8 = 8;

/// Groups in one frame of who leads what; whoever leads more sends several.
pub const LEADS_MAX: usize = 1 << 16;
/// Group, epoch and a count.
const LEAD_BYTES_MIN: usize = 3;

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum FrameError {
    #[error("what connected is no flumen broker; this port is for brokers only")]
    NotAPeer,
    #[error("a frame of {len} bytes, at most {limit} are allowed here")]
    TooLarge { len: usize, limit: usize },
    #[error("the checksum of a frame is wrong")]
    Checksum,
    #[error("flags {0:#x} that this version does not know")]
    Flags(u8),
}

/// A whole frame whose checksum is right.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RawFrame {
    pub kind: u8,
    pub version: u16,
    pub body: Bytes,
}

#[derive(Clone, Debug)]
pub enum Frame {
    Hello(Hello),
    Refusal(Refusal),
    /// A broker that has nothing to say lives: groups may sleep, brokers do not.
    Alive {
        sequence: u64,
    },
    Raft(RaftFrame),
    CatchUp(CatchUp),
    /// A request of metadata that only the leader can answer, or of one broker to another.
    Request(Request),
    Answer(Answer),
    /// Groups that the sender leads, and in which epoch.
    Leads(Vec<Lead>),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lead {
    pub group: u64,
    pub epoch: u64,
    /// Replicas that lack more than what is just on its way to them; none, usually.
    pub lagging: Vec<u64>,
}

/// How far a follower that is far behind has come; for throttling, and for people who wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CatchUp {
    pub group: u64,
    pub state: CatchUpState,
    pub index: u64,
    pub end_index: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CatchUpState {
    Running,
    Paused,
    Installed,
    Failed,
    Done,
}

const CATCH_UP_STATES: [CatchUpState; 5] = [
    CatchUpState::Running,
    CatchUpState::Paused,
    CatchUpState::Installed,
    CatchUpState::Failed,
    CatchUpState::Done,
];

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    pub id: u64,
    pub kind: u16,
    pub body: Bytes,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    pub id: u64,
    /// An error code of Kafka's, 0 for none.
    pub code: i16,
    pub body: Bytes,
}

/// Takes the next frame off the front of `input`; `None` when it is not whole yet. After an error the connection is of no use.
pub fn cut_frame(input: &mut BytesMut, body_max: usize) -> Result<Option<RawFrame>, FrameError> {
    let seen = input.len().min(MAGIC.len());
    if input[..seen] != MAGIC[..seen] {
        return Err(FrameError::NotAPeer);
    }
    if input.len() < HEADER_BYTES {
        return Ok(None);
    }
    let mut header = &input[MAGIC.len()..HEADER_BYTES];
    let kind = header.get_u8();
    let flags = header.get_u8();
    let version = header.get_u16();
    let len = header.get_u32() as usize;
    let checksum = header.get_u32();
    if flags != 0 {
        return Err(FrameError::Flags(flags));
    }
    if len > body_max {
        return Err(FrameError::TooLarge { len, limit: body_max });
    }
    if input.len() < HEADER_BYTES + len {
        return Ok(None);
    }
    let frame = input.split_to(HEADER_BYTES + len).freeze();
    let body = frame.slice(HEADER_BYTES..);
    if crc32c::crc32c_append(crc32c::crc32c(&frame[..12]), &body) != checksum {
        return Err(FrameError::Checksum);
    }
    Ok(Some(RawFrame { kind, version, body }))
}

/// Header and segments of one frame, for a vectored write.
pub(crate) fn seal(kind: u8, version: u16, body: Vec<Bytes>) -> Vec<Bytes> {
    let len: usize = body.iter().map(Bytes::len).sum();
    let mut header = [0; HEADER_BYTES];
    header[..4].copy_from_slice(&MAGIC);
    header[4] = kind;
    header[6..8].copy_from_slice(&version.to_be_bytes());
    let len = u32::try_from(len).expect("whoever fills a frame keeps to BODY_MAX");
    header[8..12].copy_from_slice(&len.to_be_bytes());
    let checksum =
        body.iter().fold(crc32c::crc32c(&header[..12]), |sum, segment| crc32c::crc32c_append(sum, segment));
    header[12..].copy_from_slice(&checksum.to_be_bytes());
    let mut frame = Vec::with_capacity(1 + body.len());
    frame.push(Bytes::copy_from_slice(&header));
    frame.extend(body);
    frame
}

impl Frame {
    pub fn encode(&self, version: u16) -> Vec<Bytes> {
        let mut out = Writer::default();
        let (kind, version) = match self {
            Frame::Hello(hello) => {
                hello.write(&mut out);
                (KIND_HELLO, 0)
            }
            Frame::Refusal(refusal) => {
                refusal.write(&mut out);
                (KIND_REFUSAL, 0)
            }
            Frame::Alive { sequence } => {
                out.number(*sequence);
                (KIND_ALIVE, version)
            }
            Frame::Raft(raft) => return seal(KIND_RAFT, version, raft.segments()),
            Frame::CatchUp(catch_up) => {
                let state = CATCH_UP_STATES.iter().position(|s| *s == catch_up.state).unwrap_or_default();
                out.u8(state as u8);
                for number in [catch_up.group, catch_up.index, catch_up.end_index] {
                    out.number(number);
                }
                (KIND_CATCH_UP, version)
            }
            Frame::Request(request) => {
                out.number(request.id);
                out.u16(request.kind);
                out.payload(&request.body);
                (KIND_REQUEST, version)
            }
            Frame::Answer(answer) => {
                out.number(answer.id);
                out.u16(answer.code as u16);
                out.payload(&answer.body);
                (KIND_ANSWER, version)
            }
            Frame::Leads(leads) => {
                debug_assert!(leads.len() <= LEADS_MAX);
                out.number(leads.len() as u64);
                let mut group = 0;
                for lead in leads {
                    out.step(&mut group, lead.group);
                    out.number(lead.epoch);
                    out.number(lead.lagging.len() as u64);
                    lead.lagging.iter().for_each(|id| out.number(*id));
                }
                (KIND_LEADS, version)
            }
        };
        seal(kind, version, out.finish())
    }

    /// Raft's messages stay coded until they are asked for, one by one.
    pub fn decode(raw: RawFrame) -> Result<Frame, DecodeError> {
        let mut reader = Reader::new(raw.body);
        let frame = match raw.kind {
            KIND_HELLO => Frame::Hello(Hello::read(&mut reader)?),
            KIND_REFUSAL => Frame::Refusal(Refusal::read(&mut reader)?),
            KIND_ALIVE => Frame::Alive { sequence: reader.number()? },
            KIND_RAFT => return RaftFrame::read(reader).map(Frame::Raft),
            KIND_CATCH_UP => Frame::CatchUp(CatchUp {
                state: *CATCH_UP_STATES
                    .get(usize::from(reader.u8()?))
                    .ok_or(DecodeError::Unknown("the state of a catch-up"))?,
                group: reader.number()?,
                index: reader.number()?,
                end_index: reader.number()?,
            }),
            KIND_REQUEST => {
                Frame::Request(Request { id: reader.number()?, kind: reader.u16()?, body: reader.payload()? })
            }
            KIND_ANSWER => Frame::Answer(Answer {
                id: reader.number()?,
                code: reader.u16()? as i16,
                body: reader.payload()?,
            }),
            KIND_LEADS => {
                let count = reader.count("the number of groups", LEADS_MAX as u64, LEAD_BYTES_MIN)?;
                let mut leads = Vec::with_capacity(count);
                let mut group = 0;
                for _ in 0..count {
                    let (group, epoch) = (reader.step(&mut group)?, reader.number()?);
                    let count = reader.count("the number of replicas", MEMBERS_MAX as u64, 1)?;
                    let lagging = (0..count).map(|_| reader.number()).collect::<Result<_, _>>()?;
                    leads.push(Lead { group, epoch, lagging });
                }
                Frame::Leads(leads)
            }
            _ => return Err(DecodeError::Unknown("the kind of a frame")),
        };
        reader.end()?;
        Ok(frame)
    }
}
