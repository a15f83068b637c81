//! A real engine process for the tests: the example `engine`, on a port that the system chose.
#![allow(dead_code)] // every test file uses a part of it

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

pub fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().expect("the repository")
}

/// The engine library; the test fails with the way to get it where it is missing.
pub fn library() -> PathBuf {
    let cached = repository().join(".cache/chdb/libchdb.so");
    match std::env::var_os("FLUMEN_CHDB_LIB") {
        Some(path) => PathBuf::from(path),
        None if cached.is_file() => cached,
        None => {
            panic!("{} is missing: run sink/embedded/fetch-engine.sh, which fetches it", cached.display())
        }
    }
}

pub struct Server {
    child: Child,
    pub address: String,
    pub data_dir: PathBuf,
}

impl Server {
    pub fn start(data_dir: &Path) -> Server {
        // target/<profile>/deps/<test> -> target/<profile>/examples/engine: cargo builds examples with the tests.
        let test = std::env::current_exe().expect("own path");
        let profile = test.parent().and_then(Path::parent).expect("target directory");
        let mut child = Command::new(profile.join("examples/engine"))
            .args(["--listen", "127.0.0.1:0", "--data-dir"])
            .arg(data_dir)
            .arg("--lib")
            .arg(library())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the engine example starts; `cargo test` builds it");
        let mut line = String::new();
        BufReader::new(child.stdout.take().expect("stdout")).read_line(&mut line).expect("a line");
        let address = line
            .strip_prefix("flumen clickhouse ready http=")
            .and_then(|rest| rest.split(' ').next())
            .unwrap_or_else(|| panic!("no ready line but {line:?}"))
            .to_owned();
        Server { child, address, data_dir: data_dir.to_owned() }
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// SIGKILL, as a crash.
    pub fn kill(mut self) -> PathBuf {
        self.child.kill().expect("kill");
        self.child.wait().expect("wait");
        self.data_dir.clone()
    }

    /// SIGTERM; gives the exit code.
    pub fn stop(mut self) -> Option<i32> {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &pid]).status().expect("kill").success());
        self.child.wait().expect("wait").code()
    }

    pub fn client(&self) -> clickhouse::Client {
        clickhouse::Client::default().with_url(self.url())
    }

    /// One raw request; gives status, head and body.
    pub fn http(&self, request: &[u8]) -> Reply {
        let mut stream = TcpStream::connect(&self.address).expect("connect");
        stream.write_all(request).expect("send");
        Reply::read(stream)
    }

    /// POST of `body` to `/` with the URL parameters given and `Connection: close`.
    pub fn post(&self, params: &str, headers: &str, body: &[u8]) -> Reply {
        let mut request = format!(
            "POST /?{params} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {}\r\n{headers}\r\n",
            body.len()
        )
        .into_bytes();
        request.extend_from_slice(body);
        self.http(&request)
    }

    /// Runs SQL that must succeed.
    pub fn sql(&self, sql: &str) -> String {
        let reply = self.post("", "", sql.as_bytes());
        assert_eq!(reply.status, 200, "{sql}: {}", reply.body);
        reply.body.trim_end().to_owned()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[derive(Debug)]
pub struct Reply {
    pub status: u16,
    pub head: String,
    pub body: String,
    pub bytes: Vec<u8>,
}

impl Reply {
    pub fn read(mut stream: TcpStream) -> Reply {
        let mut all = Vec::new();
        // A server may reset the connection after an early answer; what came is what counts.
        let _ = stream.read_to_end(&mut all);
        let split = all.windows(4).position(|w| w == b"\r\n\r\n").map_or(all.len(), |at| at + 4);
        let head = String::from_utf8_lossy(&all[..split]).to_ascii_lowercase();
        let status = head.split(' ').nth(1).and_then(|s| s.parse().ok()).unwrap_or(0);
        let bytes = all[split..].to_vec();
        Reply { status, head, body: String::from_utf8_lossy(&bytes).into_owned(), bytes }
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
    }

    /// The error code, which must be the same in header and body.
    pub fn code(&self) -> i32 {
        let code =
            self.header("x-clickhouse-exception-code").and_then(|c| c.trim().parse().ok()).unwrap_or(0);
        if code != 0 {
            assert!(self.body.starts_with(&format!("Code: {code}. DB::Exception: ")), "{}", self.body);
            assert_ne!(self.status, 200);
        }
        code
    }
}

/// A Native block of one UInt64 column `id` and one String column `text`.
pub fn native(ids: &[u64], text: &str) -> Vec<u8> {
    fn varint(out: &mut Vec<u8>, mut value: u64) {
        while value > 0x7f {
            out.push(value as u8 | 0x80);
            value >>= 7;
        }
        out.push(value as u8);
    }
    fn string(out: &mut Vec<u8>, text: &str) {
        varint(out, text.len() as u64);
        out.extend_from_slice(text.as_bytes());
    }
    let mut out = Vec::new();
    varint(&mut out, 2);
    varint(&mut out, ids.len() as u64);
    string(&mut out, "id");
    string(&mut out, "UInt64");
    for id in ids {
        out.extend_from_slice(&id.to_le_bytes());
    }
    string(&mut out, "text");
    string(&mut out, "String");
    for _ in ids {
        string(&mut out, text);
    }
    out
}
