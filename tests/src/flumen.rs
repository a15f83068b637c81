//! A running broker and its admin API.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, bail};
use serde_json::Value;

use crate::process::{Announcements, EndedEarly, Process, flumen_binary, free_port};

/// What a broker says once it serves.
pub(crate) const READY: &str = "flumen ready";

pub struct Flumen {
    process: Option<Process>,
    pub data_dir: PathBuf,
    pub kafka: String,
    pub admin: String,
    /// Beside directory and addresses; of the next start.
    pub arguments: Vec<String>,
    /// What its command line begins with: where it runs.
    inside: Vec<String>,
    /// Of the next start.
    pub environment: Vec<(&'static str, String)>,
}

impl Flumen {
    /// Starts a broker on free ports. `settings` are `key=value` pairs for `--set`.
    pub fn start(data_dir: &Path, settings: &[&str]) -> anyhow::Result<Flumen> {
        Self::start_at(data_dir, free_port(), free_port(), settings, &[])
    }

    pub fn start_at(
        data_dir: &Path,
        kafka: u16,
        admin: u16,
        settings: &[&str],
        more: &[&str],
    ) -> anyhow::Result<Flumen> {
        let mut flumen = Self::idle_at(data_dir, kafka, admin, settings, more);
        flumen.restart()?;
        Ok(flumen)
    }

    /// Not started yet.
    pub(crate) fn idle_at(
        data_dir: &Path,
        kafka: u16,
        admin: u16,
        settings: &[&str],
        more: &[&str],
    ) -> Flumen {
        let mut arguments: Vec<String> = more.iter().map(ToString::to_string).collect();
        for setting in settings {
            arguments.push("--set".to_string());
            arguments.push((*setting).to_string());
        }
        Flumen {
            process: None,
            data_dir: data_dir.to_path_buf(),
            kafka: format!("127.0.0.1:{kafka}"),
            admin: format!("127.0.0.1:{admin}"),
            arguments,
            inside: Vec::new(),
            environment: Vec::new(),
        }
    }

    /// To run somewhere else than on loopback.
    pub(crate) fn move_to(&mut self, host: &str, inside: Vec<String>) {
        for address in [&mut self.kafka, &mut self.admin] {
            *address = address.replace("127.0.0.1", host);
        }
        self.inside = inside;
    }

    /// As `start`, with an environment; `more` are further arguments.
    pub fn start_with(
        data_dir: &Path,
        settings: &[&str],
        more: &[&str],
        environment: Vec<(&'static str, String)>,
    ) -> anyhow::Result<Flumen> {
        let mut flumen = Self::idle_at(data_dir, free_port(), free_port(), settings, more);
        flumen.environment = environment;
        flumen.restart()?;
        Ok(flumen)
    }

    /// Starts the process again on the same directory and ports.
    pub fn restart(&mut self) -> anyhow::Result<()> {
        self.process = None;
        let (process, _) = Process::start("flumen server", self.command()?, READY, &self.log_path())?;
        self.process = Some(process);
        Ok(())
    }

    /// Starts the process, and does not wait: what it says on the way to `READY`.
    pub(crate) fn launch(&mut self) -> anyhow::Result<Announcements> {
        self.process = None;
        let command = self.command()?;
        let (process, announcements) = Process::launch("flumen server", command, &self.log_path())?;
        self.process = Some(process);
        Ok(announcements)
    }

    /// Its last words, when it ended before it was ready.
    pub(crate) fn ended_early(&mut self) -> anyhow::Result<anyhow::Error> {
        let mut process = self.process.take().context("the broker is not running")?;
        process.ended_early(&self.log_path())
    }

    /// Starts the process; it may never be ready.
    pub fn begin(&mut self) -> anyhow::Result<()> {
        self.process = None;
        let command = self.command()?;
        self.process = Some(Process::begin("flumen server", command, &self.log_path())?);
        Ok(())
    }

    fn log_path(&self) -> PathBuf {
        self.data_dir.join("broker.log")
    }

    /// What it has logged in all its lives.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    fn command(&self) -> anyhow::Result<Command> {
        std::fs::create_dir_all(&self.data_dir)?;
        let binary = flumen_binary()?;
        let mut command = match self.inside.split_first() {
            Some((program, arguments)) => {
                let mut command = Command::new(program);
                command.args(arguments).arg(&binary);
                command
            }
            None => Command::new(&binary),
        };
        command
            .arg("server")
            .args(["--data-dir".as_ref(), self.data_dir.join("data").as_os_str()])
            .args(["--kafka", &self.kafka, "--admin", &self.admin])
            .args(&self.arguments)
            .envs(self.environment.iter().map(|(name, value)| (name, value)));
        Ok(command)
    }

    /// Starts the process again; it may end before it is ready, and then how it did.
    pub fn restart_or_end(&mut self) -> anyhow::Result<Option<ExitStatus>> {
        match self.restart() {
            Ok(()) => Ok(None),
            Err(error) => match error.downcast_ref::<EndedEarly>() {
                Some(early) => Ok(Some(early.status)),
                None => Err(error),
            },
        }
    }

    /// Starts the process and kills it so much later, ready or not.
    pub fn restart_and_kill(&mut self, after: Duration) -> anyhow::Result<()> {
        self.process = None;
        let mut child = self.command()?.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
        std::thread::sleep(after);
        child.kill()?;
        child.wait()?;
        Ok(())
    }

    /// How the process ended, if it has; otherwise it runs.
    pub fn ended(&mut self) -> anyhow::Result<Option<ExitStatus>> {
        self.process.as_mut().context("the broker is not running")?.ended()
    }

    /// Waits until the process ends by itself.
    pub fn wait(&mut self) -> anyhow::Result<ExitStatus> {
        self.process.as_mut().context("the broker is not running")?.wait()
    }

    pub fn kill_9(&mut self) {
        if let Some(process) = self.process.take() {
            process.kill_9();
        }
    }

    pub fn stop(&mut self) -> anyhow::Result<std::process::ExitStatus> {
        self.process.take().context("the broker is not running")?.stop()
    }

    /// SIGSTOP: the process stands still as on a machine that hangs, until `resume`.
    pub fn pause(&self) -> anyhow::Result<()> {
        self.signal("-STOP")?;
        // The signal may be on its way to some of its threads.
        let tasks = format!("/proc/{}/task", self.pid().context("the broker is not running")?);
        for task in std::fs::read_dir(tasks)? {
            let stat = task?.path().join("stat");
            while !std::fs::read_to_string(&stat)?.contains(") T ") {
                std::thread::yield_now();
            }
        }
        Ok(())
    }

    pub fn resume(&self) -> anyhow::Result<()> {
        self.signal("-CONT")
    }

    fn signal(&self, signal: &str) -> anyhow::Result<()> {
        let pid = self.pid().context("the broker is not running")?;
        let sent = Command::new("kill").arg(signal).arg(pid.to_string()).status()?;
        anyhow::ensure!(sent.success(), "could not signal {pid}");
        Ok(())
    }

    pub fn is_running(&self) -> bool {
        self.process.is_some()
    }

    pub fn pid(&self) -> Option<u32> {
        self.process.as_ref().map(Process::pid)
    }

    pub fn get(&self, path: &str) -> anyhow::Result<Value> {
        self.call("GET", path, None)
    }

    pub fn call(&self, method: &str, path: &str, body: Option<&Value>) -> anyhow::Result<Value> {
        let (status, text) =
            http(method, &format!("http://{}{path}", self.admin), body.map(Value::to_string))?;
        if !(200..300).contains(&status) {
            bail!("{method} {path}: {status} {text}");
        }
        Ok(serde_json::from_str(&text).unwrap_or(Value::String(text)))
    }

    /// The command line, asking this broker.
    pub fn cli(&self, arguments: &[&str]) -> anyhow::Result<CliOutput> {
        cli(&[arguments, &["--admin", &self.admin]].concat())
    }

    pub fn create_topic(&self, name: &str, partitions: i32, configs: &Value) -> anyhow::Result<()> {
        let body = serde_json::json!({ "name": name, "partitions": partitions, "configs": configs });
        self.call("POST", "/v1/topics", Some(&body)).map(drop)
    }

    /// High watermark of every partition of a topic; 0 of those that the node has no replica of.
    pub fn end_offsets(&self, topic: &str) -> anyhow::Result<Vec<i64>> {
        let described = self.get(&format!("/v1/topics/{topic}"))?;
        Ok(described["partition_list"]
            .as_array()
            .into_iter()
            .flatten()
            .map(|p| p["high_watermark"].as_i64().unwrap_or(0))
            .collect())
    }
}

/// How a command of the command line ended.
pub struct CliOutput {
    pub success: bool,
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

/// Runs `flumen` with these arguments until it ends.
pub fn cli(arguments: &[&str]) -> anyhow::Result<CliOutput> {
    let output = Command::new(flumen_binary()?).args(arguments).output()?;
    Ok(CliOutput {
        success: output.status.success(),
        code: output.status.code(),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    })
}

/// One HTTP request; a status is an answer, not an error.
pub fn http(method: &str, url: &str, body: Option<String>) -> anyhow::Result<(u16, String)> {
    let agent: ureq::Agent = ureq::Agent::config_builder().http_status_as_error(false).build().into();
    let request = ureq::http::Request::builder()
        .method(method)
        .uri(url)
        .header("content-type", "application/json")
        .body(body.unwrap_or_default())?;
    let mut response = agent.run(request)?;
    let status = response.status().as_u16();
    // Answers here are counts, lists of ids, statuses: none is larger than this.
    let text = response.body_mut().with_config().limit(1 << 30).read_to_string()?;
    Ok((status, text))
}
