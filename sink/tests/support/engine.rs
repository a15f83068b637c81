//! The engine as a process: started, killed with SIGKILL, started again on the same data and port.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use flumen_sink::client::{ClickHouse, Endpoint};

pub struct Engine {
    child: Option<Child>,
    pub port: u16,
    directory: tempfile::TempDir,
}

fn library() -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.cache/chdb/libchdb.so");
    assert!(
        path.exists(),
        "{} is not there. This test needs the real ClickHouse engine: run sink/embedded/fetch-engine.sh once, then again.",
        path.display()
    );
    path
}

/// `target/<profile>/examples/engine`, built if it is not there yet.
fn binary() -> PathBuf {
    let test = std::env::current_exe().expect("the test has a path");
    let profile = test.parent().and_then(Path::parent).expect("target/<profile>/deps/test");
    let path = profile.join("examples/engine");
    if !path.exists() {
        let mut build = Command::new(env!("CARGO"));
        build.args(["build", "-q", "-p", "flumen-embedded", "--example", "engine"]);
        if profile.ends_with("release") {
            build.arg("--release");
        }
        let status = build.current_dir(env!("CARGO_MANIFEST_DIR")).status().expect("cargo runs");
        assert!(status.success() && path.exists(), "the engine example does not build");
    }
    path
}

impl Engine {
    pub fn start() -> Engine {
        let port = std::net::TcpListener::bind("127.0.0.1:0")
            .and_then(|listener| listener.local_addr())
            .expect("a free port")
            .port();
        let mut engine =
            Engine { child: None, port, directory: tempfile::tempdir().expect("a temporary directory") };
        engine.run();
        engine
    }

    pub fn run(&mut self) {
        assert!(self.child.is_none(), "the engine runs already");
        let mut child = Command::new(binary())
            .arg("--data-dir")
            .arg(self.directory.path().join("data"))
            .args(["--listen", &format!("127.0.0.1:{}", self.port)])
            .arg("--lib")
            .arg(library())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("the engine starts");
        let mut line = String::new();
        let stdout = child.stdout.take().expect("piped");
        BufReader::new(stdout).read_line(&mut line).expect("the engine says that it is ready");
        assert!(line.contains("ready"), "the engine says {line:?}");
        self.child = Some(child);
    }

    /// SIGKILL, as a crash.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().expect("SIGKILL");
            child.wait().expect("the engine ends");
        }
    }

    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}/", self.port)
    }

    pub fn client(&self) -> ClickHouse {
        ClickHouse::new(&Endpoint::parse(&self.url()).expect("a URL"))
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.kill();
    }
}
