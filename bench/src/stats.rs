//! What the machine says about a process: CPU seconds, resident memory, and how busy the host was meanwhile.
//!
//! Reads `/proc`, any thread. CPU is `utime + stime` of the whole thread group, which the kernel scales to the
//! scheduler's exact run time; writeback done by kernel threads is not in it.

use anyhow::{Context, Result};
use serde::Serialize;

/// `USER_HZ`, fixed at 100 on every Linux this runs on (x86-64 and arm64).
const TICKS_PER_SECOND: f64 = 100.0;

/// The share of the machine that something else may use before a figure is called disturbed.
pub const NOISE_MAX: f64 = 0.05;

#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct Cpu {
    pub user_s: f64,
    pub system_s: f64,
}

impl Cpu {
    pub fn total(self) -> f64 {
        self.user_s + self.system_s
    }

    pub fn since(self, earlier: Cpu) -> Cpu {
        Cpu { user_s: self.user_s - earlier.user_s, system_s: self.system_s - earlier.system_s }
    }
}

pub fn cpu(pid: u32) -> Result<Cpu> {
    let path = format!("/proc/{pid}/stat");
    let text = std::fs::read_to_string(&path).with_context(|| format!("process {pid} is gone"))?;
    parse_cpu(&text).with_context(|| format!("unexpected content of {path}"))
}

/// The command name may hold spaces and parentheses, so fields are counted from the last `)`.
fn parse_cpu(text: &str) -> Option<Cpu> {
    let rest = &text[text.rfind(')')? + 1..];
    let mut fields = rest.split_ascii_whitespace().skip(11);
    let user: f64 = fields.next()?.parse().ok()?;
    let system: f64 = fields.next()?.parse().ok()?;
    Some(Cpu { user_s: user / TICKS_PER_SECOND, system_s: system / TICKS_PER_SECOND })
}

/// Resident memory in MiB.
pub fn rss_mib(pid: u32) -> Result<f64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status"))
        .with_context(|| format!("process {pid} is gone"))?;
    let line = text.lines().find_map(|l| l.strip_prefix("VmRSS:")).context("no VmRSS")?;
    let kib: f64 = line.trim().trim_end_matches("kB").trim().parse()?;
    Ok(kib / 1024.0)
}

/// Bytes this process caused to be written to storage (`/proc/PID/io`).
pub fn written_bytes(pid: u32) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/io")).ok()?;
    text.lines().find_map(|l| l.strip_prefix("write_bytes: "))?.trim().parse().ok()
}

/// Open file descriptors of a process.
pub fn open_files(pid: u32) -> Option<usize> {
    Some(std::fs::read_dir(format!("/proc/{pid}/fd")).ok()?.count())
}

/// The same of several processes together; `None` of none.
pub fn cpu_of(pids: &[u32]) -> Result<Option<Cpu>> {
    let each = pids.iter().map(|pid| cpu(*pid)).collect::<Result<Vec<Cpu>>>()?;
    Ok(each.into_iter().reduce(|a, b| Cpu { user_s: a.user_s + b.user_s, system_s: a.system_s + b.system_s }))
}

pub fn rss_mib_of(pids: &[u32]) -> Result<Option<f64>> {
    Ok(pids.iter().map(|pid| rss_mib(*pid)).collect::<Result<Vec<f64>>>()?.into_iter().reduce(|a, b| a + b))
}

pub fn written_bytes_of(pids: &[u32]) -> Option<u64> {
    let each: Option<Vec<u64>> = pids.iter().map(|pid| written_bytes(*pid)).collect();
    each?.into_iter().reduce(|a, b| a + b)
}

pub fn open_files_of(pids: &[u32]) -> Option<usize> {
    let each: Option<Vec<usize>> = pids.iter().map(|pid| open_files(*pid)).collect();
    each?.into_iter().reduce(|a, b| a + b)
}

/// Set for the kernel's own threads in the flags of `/proc/PID/stat`.
const PF_KTHREAD: u64 = 0x0020_0000;

/// CPU seconds of all kernel threads since boot: write-back, block device, timers. They work for whoever wrote, so they
/// are neither a broker's CPU nor a disturbance. 0 where a container hides them.
pub fn kernel_threads_cpu_s() -> f64 {
    let Ok(processes) = std::fs::read_dir("/proc") else { return 0.0 };
    processes
        .flatten()
        .filter(|p| p.file_name().as_encoded_bytes().iter().all(u8::is_ascii_digit))
        // A process that has ended since the listing.
        .filter_map(|p| std::fs::read_to_string(p.path().join("stat")).ok())
        .filter(|text| is_kernel_thread(text))
        .filter_map(|text| parse_cpu(&text))
        .map(Cpu::total)
        .sum()
}

fn is_kernel_thread(stat: &str) -> bool {
    let flags = stat.rfind(')').and_then(|at| stat[at + 1..].split_ascii_whitespace().nth(6));
    flags.and_then(|f| f.parse::<u64>().ok()).is_some_and(|f| f & PF_KTHREAD != 0)
}

/// Seconds of all cores together since boot.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct Host {
    pub busy_s: f64,
    pub steal_s: f64,
    pub iowait_s: f64,
}

impl Host {
    pub fn since(self, earlier: Host) -> Host {
        Host {
            busy_s: self.busy_s - earlier.busy_s,
            steal_s: self.steal_s - earlier.steal_s,
            iowait_s: self.iowait_s - earlier.iowait_s,
        }
    }
}

pub fn host() -> Host {
    let text = std::fs::read_to_string("/proc/stat").unwrap_or_default();
    let v: Vec<f64> = text
        .lines()
        .next()
        .unwrap_or_default()
        .split_ascii_whitespace()
        .skip(1)
        .map(|f| f.parse::<f64>().unwrap_or(0.0) / TICKS_PER_SECOND)
        .collect();
    let at = |i: usize| v.get(i).copied().unwrap_or(0.0);
    Host { busy_s: at(0) + at(1) + at(2) + at(5) + at(6), steal_s: at(7), iowait_s: at(4) }
}

/// One line about the hardware, for the head of every result.
#[derive(Debug, Clone, Serialize)]
pub struct Machine {
    pub cpu: String,
    pub cores: usize,
    pub memory_gib: f64,
    pub kernel: String,
    pub data_filesystem: String,
}

pub fn machine(data: &std::path::Path) -> Machine {
    let read = |p: &str| std::fs::read_to_string(p).unwrap_or_default();
    let field = |text: &str, name: &str| {
        text.lines()
            .find(|l| l.starts_with(name))
            .and_then(|l| l.split(':').nth(1))
            .map(|v| v.trim().to_string())
            .unwrap_or_default()
    };
    let kib: f64 =
        field(&read("/proc/meminfo"), "MemTotal").trim_end_matches(" kB").trim().parse().unwrap_or(0.0);
    let data = data.canonicalize().unwrap_or_else(|_| data.to_path_buf());
    let data_filesystem = read("/proc/mounts")
        .lines()
        .filter_map(|l| {
            let mut f = l.split(' ');
            Some((f.nth(1)?.to_string(), f.next()?.to_string()))
        })
        .filter(|(mount, _)| data.starts_with(mount))
        .max_by_key(|(mount, _)| mount.len())
        .map(|(_, kind)| kind)
        .unwrap_or_default();
    Machine {
        cpu: field(&read("/proc/cpuinfo"), "model name"),
        cores: std::thread::available_parallelism().map_or(0, |n| n.get()),
        memory_gib: (kib / 1024.0 / 1024.0 * 10.0).round() / 10.0,
        kernel: read("/proc/sys/kernel/osrelease").trim().to_string(),
        data_filesystem,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_with_parentheses_do_not_shift_the_fields() {
        let line = "42 (a) b (c)) S 1 42 42 0 -1 4194304 1 2 3 4 250 50 0 0 20 0 1 0 1 1 1";
        let c = parse_cpu(line).unwrap();
        assert_eq!((c.user_s, c.system_s), (2.5, 0.5));
    }

    #[test]
    fn kernel_threads_are_told_by_their_flag() {
        let kthreadd = "2 (kthreadd) S 0 0 0 0 -1 2129984 0 0 0 0 0 1 0 0 20 0 1 0 24 0 0";
        let ours = std::fs::read_to_string("/proc/self/stat").unwrap();
        assert!(is_kernel_thread(kthreadd));
        assert!(!is_kernel_thread(&ours));
    }

    #[test]
    fn this_process_can_be_read() {
        let pid = std::process::id();
        assert!(cpu(pid).is_ok());
        assert!(rss_mib(pid).unwrap() > 0.1);
        assert!(host().busy_s > 0.0);
    }
}
