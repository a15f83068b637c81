//! A broker's wall clock, set by a test. The others of the machine, and clocks that only go on, stay as they are.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, ensure};

use crate::process::repository;

pub struct Clock {
    file: PathBuf,
    library: PathBuf,
}

impl Clock {
    /// One that is right until it is set. Whoever links Rust has the compiler that this needs.
    pub fn new(dir: &Path, name: &str) -> anyhow::Result<Clock> {
        let (file, library) = (dir.join(format!("{name}.clock")), dir.join("jumping_clock.so"));
        std::fs::write(&file, 0i64.to_ne_bytes())?;
        if !library.exists() {
            let source = repository().join("tests/clock/jumping_clock.c");
            let mut compiler = Command::new("cc");
            compiler.args(["-shared", "-fPIC", "-O1", "-o"]).arg(&library).arg(source);
            ensure!(compiler.status().context("cc")?.success(), "the clock was not compiled");
        }
        Ok(Clock { file, library })
    }

    /// For the broker that is to have it.
    pub fn environment(&self) -> [(&'static str, String); 2] {
        let text = |path: &Path| path.display().to_string();
        [("LD_PRELOAD", text(&self.library)), ("CLOCK_AHEAD", text(&self.file))]
    }

    /// So far ahead of the machine's; at once.
    pub fn set_ahead_ms(&self, ahead_ms: i64) -> anyhow::Result<()> {
        // In place: the broker has the file in its memory.
        let file = std::fs::OpenOptions::new().write(true).open(&self.file)?;
        std::os::unix::fs::FileExt::write_all_at(&file, &ahead_ms.to_ne_bytes(), 0)?;
        Ok(())
    }
}
