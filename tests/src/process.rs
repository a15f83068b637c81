//! A child process that announces itself with a ready line on stdout.

use std::io::{BufRead, BufReader, Lines};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};

use anyhow::{Context, bail};

/// A process that ended instead of saying that it is ready.
#[derive(Debug)]
pub struct EndedEarly {
    pub status: ExitStatus,
    what: String,
}

impl std::fmt::Display for EndedEarly {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} with {} before it was ready", self.what, self.status)
    }
}

impl std::error::Error for EndedEarly {}

pub struct Process {
    child: Child,
    name: String,
}

/// What a process says before it is ready.
pub struct Announcements {
    lines: Lines<BufReader<ChildStdout>>,
}

impl Announcements {
    /// The first line that starts with `ready`; `None` if the process ended before.
    pub fn until(mut self, ready: &str) -> anyhow::Result<Option<String>> {
        for line in self.lines.by_ref() {
            let line = line?;
            if line.starts_with(ready) {
                // The pipe must stay open and be emptied, or the child would stop at a full one.
                std::thread::spawn(move || self.lines.for_each(drop));
                return Ok(Some(line));
            }
        }
        Ok(None)
    }
}

impl Process {
    /// Starts `command` and returns the first line of its output that starts with `ready`.
    pub fn start(name: &str, command: Command, ready: &str, log: &Path) -> anyhow::Result<(Process, String)> {
        let (mut process, announcements) = Process::launch(name, command, log)?;
        match announcements.until(ready)? {
            Some(line) => Ok((process, line)),
            None => Err(process.ended_early(log)?),
        }
    }

    /// Starts `command`, and does not wait until it is ready.
    pub fn launch(name: &str, mut command: Command, log: &Path) -> anyhow::Result<(Process, Announcements)> {
        let errors = std::fs::OpenOptions::new().create(true).append(true).open(log)?;
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(errors)
            .spawn()
            .with_context(|| format!("cannot start {name}: {command:?}"))?;
        let stdout = child.stdout.take().context("no stdout")?;
        let lines = BufReader::new(stdout).lines();
        Ok((Process { child, name: name.to_string() }, Announcements { lines }))
    }

    /// With its last words, of one that said that it is ready not even at its end.
    pub fn ended_early(&mut self, log: &Path) -> anyhow::Result<anyhow::Error> {
        const WORDS: usize = 10;
        let status = self.child.wait()?;
        let said = std::fs::read_to_string(log).unwrap_or_default();
        let lines: Vec<&str> = said.lines().collect();
        let last = lines[lines.len().saturating_sub(WORDS)..].join("\n");
        let ended = EndedEarly { status, what: format!("{} ended", self.name) };
        Ok(anyhow::Error::new(ended).context(last))
    }

    /// Starts `command`, whatever it says on its output.
    pub fn begin(name: &str, mut command: Command, log: &Path) -> anyhow::Result<Process> {
        let errors = std::fs::OpenOptions::new().create(true).append(true).open(log)?;
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(errors);
        let child = command.spawn().with_context(|| format!("cannot start {name}: {command:?}"))?;
        Ok(Process { child, name: name.to_string() })
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// SIGKILL, and waits until it is gone.
    pub fn kill_9(mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// SIGTERM, and the exit status.
    pub fn stop(mut self) -> anyhow::Result<std::process::ExitStatus> {
        let sent = Command::new("kill").arg("-TERM").arg(self.pid().to_string()).status()?;
        if !sent.success() {
            bail!("could not signal {}", self.name);
        }
        Ok(self.child.wait()?)
    }

    pub fn wait(&mut self) -> anyhow::Result<std::process::ExitStatus> {
        Ok(self.child.wait()?)
    }

    /// How it ended, if it has.
    pub fn ended(&mut self) -> anyhow::Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A port that was free a moment ago.
pub fn free_port() -> u16 {
    free_ports::<1>()[0]
}

/// Below those that the system gives to outgoing connections (from 32768 on): one of these may take a port between here and the
/// broker that is to listen on it. No two questions of a process get the same, and processes begin at different ones.
const PORTS: std::ops::Range<u32> = 10_240..32_000;
static PORTS_GIVEN: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);

/// Different ones.
pub fn free_ports<const N: usize>() -> [u16; N] {
    let first = std::process::id().wrapping_mul(97);
    let next = || {
        let given = PORTS_GIVEN.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let port = PORTS.start + first.wrapping_add(given) % (PORTS.end - PORTS.start);
        u16::try_from(port).expect("PORTS are ports")
    };
    let bind = |_| loop {
        if let Ok(listener) = std::net::TcpListener::bind(("127.0.0.1", next())) {
            return listener;
        }
    };
    let listeners: [std::net::TcpListener; N] = std::array::from_fn(bind);
    listeners.map(|listener| listener.local_addr().expect("a bound socket has an address").port())
}

/// `preferred` when nobody listens there, else a free one.
pub fn port_or_free(preferred: u16) -> u16 {
    match std::net::TcpListener::bind(("127.0.0.1", preferred)) {
        Ok(_) => preferred,
        Err(_) => free_port(),
    }
}

/// The `flumen` binary: `FLUMEN_BIN`, or the one built beside the running test.
pub fn flumen_binary() -> anyhow::Result<PathBuf> {
    if let Some(path) = std::env::var_os("FLUMEN_BIN") {
        return Ok(path.into());
    }
    let mut dir = std::env::current_exe()?;
    while dir.pop() {
        let candidate = dir.join("flumen");
        if candidate.is_file() {
            return Ok(candidate);
        }
    }
    bail!(
        "no flumen binary beside this test: build it first (cargo build -p flumen-broker), or set FLUMEN_BIN"
    )
}

/// The top of the repository, seen from this crate.
pub fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().map(Path::to_path_buf).unwrap_or_default()
}
