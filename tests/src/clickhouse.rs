//! A running ClickHouse: `CLICKHOUSE_URL` when set, else the embedded engine in a process of its own.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::bail;

use crate::flumen::http;
use crate::process::{Process, flumen_binary, repository};

pub struct ClickHouse {
    process: Option<Process>,
    data_dir: PathBuf,
    host: String,
    port: u16,
    pub url: String,
}

impl ClickHouse {
    pub fn start(data_dir: &Path, port: u16) -> anyhow::Result<ClickHouse> {
        if let Ok(url) = std::env::var("CLICKHOUSE_URL")
            && !url.is_empty()
        {
            return Ok(ClickHouse {
                process: None,
                data_dir: data_dir.to_path_buf(),
                host: String::new(),
                port: 0,
                url,
            });
        }
        Self::start_own(data_dir, port)
    }

    /// The embedded engine, whatever else there is: for tests that kill it.
    pub fn start_own(data_dir: &Path, port: u16) -> anyhow::Result<ClickHouse> {
        Self::start_own_at(data_dir, "127.0.0.1", port)
    }

    /// Where others than this machine's processes reach it.
    pub fn start_own_at(data_dir: &Path, host: &str, port: u16) -> anyhow::Result<ClickHouse> {
        let (host, url) = (host.to_string(), format!("http://{host}:{port}"));
        let mut engine = ClickHouse { process: None, data_dir: data_dir.to_path_buf(), host, port, url };
        engine.restart()?;
        Ok(engine)
    }

    /// Whether this process may be killed: an outside server may not.
    pub fn is_ours(&self) -> bool {
        self.port != 0
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    pub fn restart(&mut self) -> anyhow::Result<()> {
        if !self.is_ours() {
            return Ok(());
        }
        self.process = None;
        std::fs::create_dir_all(&self.data_dir)?;
        let mut command = Command::new(flumen_binary()?);
        command
            .arg("clickhouse")
            .args(["--data-dir".as_ref(), self.data_dir.join("clickhouse").as_os_str()])
            .args(["--listen", &format!("{}:{}", self.host, self.port)]);
        // `make engine` puts it there; tests do not run at the top of the repository, where it would be found.
        let library = repository().join(".cache/chdb/libchdb.so");
        if std::env::var_os("FLUMEN_CHDB_LIB").is_none() && library.is_file() {
            command.args(["--lib".as_ref(), library.as_os_str()]);
        }
        let log = self.data_dir.join("clickhouse.log");
        let (process, _ready) =
            Process::start("flumen clickhouse", command, "flumen clickhouse ready", &log)?;
        self.process = Some(process);
        Ok(())
    }

    pub fn kill_9(&mut self) {
        if let Some(process) = self.process.take() {
            process.kill_9();
        }
    }

    pub fn pid(&self) -> Option<u32> {
        self.process.as_ref().map(Process::pid)
    }

    /// Runs one statement and returns its output (TabSeparated unless it names a FORMAT).
    pub fn query(&self, sql: &str) -> anyhow::Result<String> {
        let (status, text) =
            http("POST", &format!("{}/", self.url.trim_end_matches('/')), Some(sql.to_string()))?;
        if status != 200 {
            bail!("{sql}: {status} {text}");
        }
        Ok(text)
    }

    pub fn number(&self, sql: &str) -> anyhow::Result<i64> {
        let text = self.query(sql)?;
        text.trim().parse().map_err(|_| anyhow::anyhow!("{sql}: expected a number, got '{}'", text.trim()))
    }
}
