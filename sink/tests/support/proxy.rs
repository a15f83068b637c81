//! An HTTP proxy that breaks inserts on purpose and passes everything else through.
//!
//! Shared by the tests of the export alone and by those of the whole broker, so it stands on its own: `start` needs a
//! tokio runtime and serves as long as that runs.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// A small generator of its own, so that a seed names a run.
#[derive(Clone, Debug)]
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Forwarded as it is.
    None,
    /// Never reaches the server; the connection is closed.
    DropBefore,
    /// Committed; the answer is dropped.
    DropAfter,
    /// A 500 that is not ClickHouse's, without forwarding.
    Refuse500,
    /// A 502 that is not ClickHouse's, after the server committed.
    Commit502,
    /// Half of the body reaches the server, then the connection is cut.
    CutBody,
    /// The server gets it twice; the client gets the second answer.
    Twice,
    /// Held back longer than the client waits, then sent all the same, if the server it was on its way to still runs.
    Late,
    /// The server's answer is cut in the middle of its head.
    CutAnswer,
}

struct Shared {
    server: u16,
    /// Dealt out to inserts, all of them before any comes again; empty: no faults.
    faults: Vec<Fault>,
    deck: Vec<Fault>,
    random: Random,
    late: Duration,
    log: Vec<Fault>,
    /// Faults that are over: whatever was to reach the server has.
    over: Vec<Fault>,
}

#[derive(Clone)]
pub struct Proxy {
    pub port: u16,
    shared: Arc<Mutex<Shared>>,
}

struct Request {
    head: String,
    body: Vec<u8>,
}

impl Proxy {
    pub async fn start(server: u16, seed: u64, late: Duration) -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let port = listener.local_addr().expect("bound").port();
        let shared = Shared {
            server,
            faults: Vec::new(),
            deck: Vec::new(),
            random: Random(seed),
            late,
            log: Vec::new(),
            over: Vec::new(),
        };
        let proxy = Proxy { port, shared: Arc::new(Mutex::new(shared)) };
        let serving = proxy.clone();
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let proxy = serving.clone();
                tokio::spawn(async move { proxy.serve(client).await });
            }
        });
        proxy
    }

    /// For tests without a runtime: serves on a thread of its own until the process ends.
    pub fn start_on_thread(server: u16, seed: u64, late: Duration) -> Proxy {
        let (tell, started) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(async move {
                let _ = tell.send(Proxy::start(server, seed, late).await);
                std::future::pending::<()>().await;
            });
        });
        started.recv().expect("the proxy starts")
    }

    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}/", self.port)
    }

    fn shared(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().expect("no panic under this lock")
    }

    pub fn set_faults(&self, faults: &[Fault]) {
        let mut shared = self.shared();
        shared.faults = faults.to_vec();
        shared.deck.clear();
    }

    pub fn happened(&self, fault: Fault) -> usize {
        self.shared().log.iter().filter(|f| **f == fault).count()
    }

    /// How many faults of the kind are over, with all that reached the server because of them.
    pub fn answered(&self, fault: Fault) -> usize {
        self.shared().over.iter().filter(|f| **f == fault).count()
    }

    async fn serve(&self, mut client: TcpStream) {
        // Answers end with the connection: simple, and every request may meet another fault.
        let Some(request) = read_request(&mut client, &mut Vec::new()).await else { return };
        let insert = request.head.contains("INSERT") && !request.head.contains("SELECT");
        let fault = {
            let mut shared = self.shared();
            if insert && shared.deck.is_empty() {
                shared.deck = shared.faults.clone();
            }
            if insert && !shared.deck.is_empty() {
                let left = shared.deck.len() as u64;
                let at = shared.random.below(left) as usize;
                let fault = shared.deck.swap_remove(at);
                shared.log.push(fault);
                fault
            } else {
                Fault::None
            }
        };
        let (server, late) = {
            let shared = self.shared();
            (shared.server, shared.late)
        };
        let answer = match fault {
            Fault::None => forward(server, &request, None).await,
            Fault::Twice => {
                forward(server, &request, None).await;
                // The copy comes under the same query id, after the first is done.
                forward(server, &request, None).await
            }
            Fault::DropBefore => return,
            Fault::DropAfter => {
                forward(server, &request, None).await;
                return;
            }
            Fault::Refuse500 => Some(plain("500 Internal Server Error", "the proxy is unwell")),
            Fault::Commit502 => {
                forward(server, &request, None).await;
                Some(plain("502 Bad Gateway", ""))
            }
            Fault::CutBody => {
                forward(server, &request, Some(request.body.len() / 2)).await;
                return;
            }
            Fault::Late => {
                let Ok(upstream) = TcpStream::connect(("127.0.0.1", server)).await else { return };
                tokio::time::sleep(late).await;
                send(upstream, &request, None).await;
                self.shared().over.push(fault);
                return;
            }
            Fault::CutAnswer => forward(server, &request, None).await.map(|mut answer| {
                answer.truncate(20);
                answer
            }),
        };
        let Some(answer) = answer else { return };
        let _ = client.write_all(&answer).await;
    }
}

fn plain(status: &str, body: &str) -> Vec<u8> {
    format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}", body.len())
        .into_bytes()
}

async fn read_request(client: &mut TcpStream, buffer: &mut Vec<u8>) -> Option<Request> {
    let head_end = loop {
        if let Some(at) = buffer.windows(4).position(|w| w == b"\r\n\r\n") {
            break at + 4;
        }
        if client.read_buf(buffer).await.ok()? == 0 {
            return None;
        }
    };
    let head = String::from_utf8(buffer.drain(..head_end).collect()).ok()?;
    let lower = head.to_ascii_lowercase();
    let mut body = Vec::new();
    if lower.contains("transfer-encoding: chunked") {
        loop {
            let line_end = loop {
                if let Some(at) = buffer.windows(2).position(|w| w == b"\r\n") {
                    break at;
                }
                if client.read_buf(buffer).await.ok()? == 0 {
                    return None;
                }
            };
            let line = String::from_utf8(buffer.drain(..line_end + 2).collect()).ok()?;
            let size = usize::from_str_radix(line.trim().split(';').next()?, 16).ok()?;
            while buffer.len() < size + 2 {
                if client.read_buf(buffer).await.ok()? == 0 {
                    return None;
                }
            }
            body.extend(buffer.drain(..size));
            buffer.drain(..2);
            if size == 0 {
                break;
            }
        }
    } else {
        let length = lower
            .lines()
            .find_map(|line| line.strip_prefix("content-length:"))
            .and_then(|value| value.trim().parse::<usize>().ok())
            .unwrap_or(0);
        while buffer.len() < length {
            if client.read_buf(buffer).await.ok()? == 0 {
                return None;
            }
        }
        body.extend(buffer.drain(..length));
    }
    Some(Request { head, body })
}

/// Sends the request on a connection of its own and returns the whole answer; with `cut`, only that much of the body.
async fn forward(server: u16, request: &Request, cut: Option<usize>) -> Option<Vec<u8>> {
    send(TcpStream::connect(("127.0.0.1", server)).await.ok()?, request, cut).await
}

async fn send(mut upstream: TcpStream, request: &Request, cut: Option<usize>) -> Option<Vec<u8>> {
    let mut head = String::new();
    for line in request.head.trim_end().lines() {
        let lower = line.to_ascii_lowercase();
        let framing = ["content-length:", "transfer-encoding:", "connection:", "expect:"];
        if !framing.iter().any(|name| lower.starts_with(name)) {
            head.push_str(line);
            head.push_str("\r\n");
        }
    }
    head.push_str(&format!("Content-Length: {}\r\nConnection: close\r\n\r\n", request.body.len()));
    upstream.write_all(head.as_bytes()).await.ok()?;
    let body = cut.map_or(&request.body[..], |cut| &request.body[..cut]);
    upstream.write_all(body).await.ok()?;
    if cut.is_some() {
        // Closing with unread data behind the head: the server sees the body end early.
        let _ = upstream.shutdown().await;
    }
    let mut answer = Vec::new();
    upstream.read_to_end(&mut answer).await.ok()?;
    Some(answer).filter(|answer| !answer.is_empty())
}
