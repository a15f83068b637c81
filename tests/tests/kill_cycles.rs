//! A broker that dies again and again under load: by kill -9 at any moment, also while it starts, and by its own hand at
//! every named place (`storage/src/failpoint.rs`). After each death the log is what was acknowledged.
//!
//! One death at every place and some others in `make test`; 200 in `make test-full`. `CYCLES` and `SEED` choose others. Needs a
//! broker with debug assertions, which is what the tests build.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::process::ExitStatusExt;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use flumen_tests::flumen::{Flumen, cli};
use flumen_tests::kafka::read_all;
use flumen_tests::load::Load;
use flumen_tests::wire::{Wire, batch, produce};
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use serde_json::json;

/// Every place, and how often it may be passed before it is the last time.
const PLACES: [(&str, u32); 16] = [
    ("roll-created", 3),
    ("roll-written", 3),
    ("retire-synced", 4),
    ("retire-counted", 4),
    ("compact-written", 3),
    ("compact-renamed", 3),
    ("compact-swapped", 3),
    ("producers-torn", 3),
    ("producers-written", 3),
    ("metadata-written", 2),
    ("metadata-renamed", 2),
    ("recovery-synced", 1),
    ("recovery-states", 1),
    ("recovery-current", 1),
    ("deletion-renamed", 3),
    ("deletion-recorded", 3),
];

const ABORTED: i32 = 6;

/// Sent within one life of the broker; a place that was not passed by then is never passed.
const BYTES_MAX: u64 = 400 << 20;

/// All that was ever written is read after so many deaths; else what came since the death before the last.
const READ_ALL_INTERVAL: usize = 25;

#[derive(Debug, Clone)]
enum Death {
    /// kill -9, so long after the ready line.
    Any(u64),
    /// kill -9, so long after the process began.
    AtStart(u64),
    Place(&'static str, u32),
}

/// Topics that come and go, as far as the broker has answered.
#[derive(Default)]
struct Topics {
    next: u64,
    alive: BTreeMap<String, bool>,
    deleted: BTreeSet<String>,
    /// No answer came to their creation or deletion.
    unknown: BTreeSet<String>,
}

impl Topics {
    /// One change; `false` when the broker did not answer.
    fn step(&mut self, flumen: &Flumen) -> bool {
        if self.alive.len() < 4 {
            self.next += 1;
            let name = format!("short-{:05}", self.next);
            if flumen.create_topic(&name, 1, &json!({})).is_err() {
                self.unknown.insert(name);
                return false;
            }
            let written = Wire::connect(&flumen.kafka).and_then(|mut wire| {
                let answer = wire.ask(9, &produce(&name, 0, -1, Some(batch(&["one", "two"], |_| {}))))?;
                Ok(answer.responses[0].partition_responses[0].error_code == 0)
            });
            self.alive.insert(name, written.unwrap_or(false));
            return true;
        }
        let Some((name, _)) = self.alive.pop_first() else { return true };
        let gone = flumen.call("DELETE", &format!("/v1/topics/{name}"), None).is_ok();
        if gone {
            self.deleted.insert(name)
        } else {
            self.unknown.insert(name)
        };
        gone
    }

    fn check(&mut self, flumen: &Flumen) -> anyhow::Result<()> {
        let listed = flumen.get("/v1/topics")?;
        let listed = listed["topics"].as_array().or(listed.as_array()).context("no list of topics")?;
        let names: BTreeSet<String> =
            listed.iter().filter_map(|topic| topic["name"].as_str().map(str::to_string)).collect();
        for (name, written) in &self.alive {
            ensure!(names.contains(name), "{name} was created and is gone");
            let ends = flumen.end_offsets(name)?;
            ensure!(!written || ends == [2], "{name} ends at {ends:?}");
            if *written {
                ensure!(read_all(&flumen.kafka, name, &ends)?.len() == 2, "{name} has lost records");
            }
        }
        for name in &self.deleted {
            ensure!(!names.contains(name), "{name} was deleted and is back");
        }
        for name in std::mem::take(&mut self.unknown) {
            if names.contains(&name) {
                self.alive.insert(name, false);
            } else {
                self.deleted.insert(name);
            }
        }
        Ok(())
    }
}

/// Every place once, kill -9 for the rest, in an order of the seed's.
fn plan(random: &mut StdRng, cycles: usize) -> Vec<Death> {
    let mut deaths: Vec<Death> = Vec::new();
    for (name, passages) in PLACES.iter().cycle().take(PLACES.len().max(cycles / 2)) {
        deaths.push(Death::Place(name, random.random_range(1..=*passages)));
    }
    while deaths.len() < cycles {
        deaths.push(match random.random_range(0..4) {
            0 => Death::AtStart(random.random_range(1..150)),
            _ => Death::Any(random.random_range(20..1_500)),
        });
    }
    deaths.shuffle(random);
    deaths
}

/// One life, from its start to its death.
fn live(flumen: &mut Flumen, death: &Death, loads: &[Load], topics: &mut Topics) -> anyhow::Result<()> {
    let sent = || loads.iter().map(Load::bytes).sum::<u64>();
    let until = match death {
        Death::AtStart(ms) => {
            flumen.kill_9();
            return flumen.restart_and_kill(Duration::from_millis(*ms));
        }
        Death::Any(ms) => Some(Instant::now() + Duration::from_millis(*ms)),
        Death::Place(name, passage) => {
            flumen.kill_9();
            let small = flumen.environment.clone();
            flumen.environment.push(("FLUMEN_FAILPOINT", format!("{name}:{passage}")));
            let ended = flumen.restart_or_end();
            flumen.environment = small;
            if let Some(status) = ended? {
                ensure!(status.signal() == Some(ABORTED), "{name}: {status}");
                return Ok(());
            }
            None
        }
    };
    let limit = sent() + BYTES_MAX;
    loop {
        topics.step(flumen);
        if let Some(until) = until {
            if Instant::now() >= until {
                flumen.kill_9();
                return Ok(());
            }
        } else if let Some(status) = flumen.ended()? {
            ensure!(status.signal() == Some(ABORTED), "{death:?}: {status}");
            return Ok(());
        } else if sent() > limit {
            bail!("{death:?} never came");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn cycles(seed: u64, cycles: usize) -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let data = dir.path().join("data").display().to_string();
    let mut random = StdRng::seed_from_u64(seed);
    let small = vec![("FLUMEN_SMALL", "1".to_string())];
    let mut flumen = Flumen::start_with(dir.path(), &[], &[], small)?;
    // The smallest segments that there are.
    let segments = ("segment.bytes", json!("1048576"));
    for (name, partitions, more) in [
        ("durable", 3, vec![]),
        ("os", 2, vec![("flumen.durability", json!("os"))]),
        (
            "compacted",
            1,
            vec![("cleanup.policy", json!("compact")), ("min.cleanable.dirty.ratio", json!("0.01"))],
        ),
    ] {
        let configs =
            more.into_iter().chain([segments.clone()]).map(|(name, value)| (name.to_string(), value));
        flumen.create_topic(name, partitions, &serde_json::Value::Object(configs.collect()))?;
    }
    let pause = Duration::from_micros(500);
    let mut loads = vec![
        Load::start(&flumen, "durable", false, pause)?,
        Load::start(&flumen, "os", false, pause)?,
        Load::start(&flumen, "compacted", true, pause)?,
    ];
    let mut topics = Topics::default();
    let deaths = plan(&mut random, cycles);
    println!("seed {seed}, {} deaths", deaths.len());
    for (number, death) in deaths.iter().enumerate() {
        let describe = || format!("death {number} of seed {seed}, {death:?}");
        let began = Instant::now();
        live(&mut flumen, death, &loads, &mut topics).with_context(describe)?;
        let lived = began.elapsed();
        let acknowledged: Vec<_> = loads.iter().map(Load::acknowledged).collect();
        let everything = number % READ_ALL_INTERVAL == READ_ALL_INTERVAL - 1;
        if everything {
            let verified = cli(&["debug", "log", "verify", &data])?;
            ensure!(verified.success, "{}: {}{}", describe(), verified.stdout, verified.stderr);
        }
        loads.iter().for_each(|load| load.pause(true));
        flumen.restart().with_context(describe)?;
        for (load, acknowledged) in loads.iter_mut().zip(&acknowledged) {
            load.check(&flumen, acknowledged, everything).with_context(describe)?;
            load.pause(false);
        }
        topics.check(&flumen).with_context(describe)?;
        let total: usize = acknowledged.iter().map(BTreeMap::len).sum();
        println!(
            "{number}: {death:?} after {lived:.1?}, {total} records, checked by {:.1?}",
            began.elapsed()
        );
    }
    for load in &mut loads {
        load.finish()?;
    }
    for load in &mut loads {
        load.check_all(&flumen)?;
    }
    ensure!(flumen.stop()?.success(), "no clean stop");
    let verified = cli(&["debug", "log", "verify", &data])?;
    ensure!(verified.success, "{}{}", verified.stdout, verified.stderr);
    flumen.restart()?;
    for load in &mut loads {
        load.check_all(&flumen)?;
    }
    topics.check(&flumen)
}

#[test]
fn what_was_acknowledged_outlives_every_death() {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let full = std::env::var_os("FLUMEN_TEST_FULL").is_some();
    let deaths = number("CYCLES").unwrap_or(if full { 200 } else { 22 });
    cycles(number("SEED").unwrap_or(1), deaths as usize).unwrap();
}
