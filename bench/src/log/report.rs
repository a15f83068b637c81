//! How a session reads: a line per cell while it runs, the cells of a row in one table, and the goals at the end.

use serde::Serialize;

use super::figure::{Figure, Measure, Samples};
use super::session::{Measured, Session};
use super::variant::{ALL, DURABLE, KAFKA, NULL, Variant};
use crate::load::Mode;

#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Goal {
    AtMost(f64),
    AtLeast(f64),
    Informs,
}

/// One line of the table of goals.
#[derive(Debug, Clone, Serialize)]
pub struct Verdict {
    pub row: u8,
    pub what: String,
    /// Whose figures these are, by durability.
    pub sides: String,
    pub flumen: Option<Figure>,
    pub kafka: Option<Figure>,
    pub null: Option<Figure>,
    /// What the goal is about: a ratio, unless the line says otherwise.
    pub judged: Option<Figure>,
    pub goal: Goal,
    pub outcome: &'static str,
}

impl Verdict {
    /// Flumen's figure by Kafka's.
    pub fn ratio(
        row: u8,
        what: &str,
        goal: Goal,
        flumen: (&Variant, &Samples<'_>),
        kafka: (&Variant, &Samples<'_>),
    ) -> Self {
        let judged = flumen.1.ratio(kafka.1);
        Self {
            row,
            what: what.into(),
            sides: format!("{} / {}", flumen.0.name, kafka.0.name),
            flumen: flumen.1.figure(),
            kafka: kafka.1.figure(),
            null: None,
            judged,
            goal,
            outcome: outcome(goal, judged),
        }
    }

    /// A figure that is judged by itself; Kafka's stands beside it.
    pub fn own(
        row: u8,
        what: &str,
        goal: Goal,
        variant: &Variant,
        judged: Option<Figure>,
        kafka: Option<Figure>,
    ) -> Self {
        Self {
            row,
            what: what.into(),
            sides: variant.name.into(),
            flumen: judged,
            kafka,
            null: None,
            judged,
            goal,
            outcome: outcome(goal, judged),
        }
    }

    pub fn with_null(mut self, null: Option<Figure>) -> Self {
        self.null = null;
        self
    }

    pub fn missed(&self) -> bool {
        self.outcome.starts_with("MISSED") || [NOT_MEASURED, SPOILED].contains(&self.outcome)
    }

    /// Requests of the row failed, so that its figures are not those of the work it names.
    pub fn spoil(&mut self) {
        self.outcome = SPOILED;
    }
}

const NOT_MEASURED: &str = "NOT MEASURED";
const SPOILED: &str = "SPOILED BY ERRORS";

fn outcome(goal: Goal, judged: Option<Figure>) -> &'static str {
    let (met, surely) = match (goal, judged) {
        (Goal::Informs, Some(_)) => return "",
        (_, None) => return NOT_MEASURED,
        (Goal::AtMost(limit), Some(f)) => (f.value <= limit, f.high <= limit || f.low > limit),
        (Goal::AtLeast(limit), Some(f)) => (f.value >= limit, f.low >= limit || f.high < limit),
    };
    match (met, surely) {
        (true, true) => "ok",
        (true, false) => "ok, within noise",
        (false, true) => "MISSED",
        (false, false) => "MISSED, within noise",
    }
}

/// The usual line: one measure of one cell, Flumen by Kafka, with the null broker beside them.
pub fn compare(
    s: &Session<'_>,
    row: u8,
    what: &str,
    goal: Goal,
    cell: &str,
    measure: Measure,
    (flumen, kafka): (&Variant, &Variant),
) -> Verdict {
    let of = |v: &Variant| s.samples(row, cell, v, measure);
    Verdict::ratio(row, what, goal, (flumen, &of(flumen)), (kafka, &of(kafka)))
        .with_null(s.figure(row, cell, &NULL, measure))
}

/// A side's own ratio of two cells, judged for Flumen's default durability, with Kafka's beside it.
pub fn own_ratio(
    s: &Session<'_>,
    row: u8,
    what: &str,
    goal: Goal,
    (cell, to): (&str, &str),
    measure: Measure,
) -> Verdict {
    let of = |v: &Variant| s.samples(row, cell, v, measure).ratio(&s.samples(row, to, v, measure));
    Verdict::own(row, what, goal, &DURABLE, of(&DURABLE), of(&KAFKA))
}

pub fn number(v: f64) -> String {
    match v.abs() {
        0.0 => "0".into(),
        a if a >= 1_000.0 => format!("{v:.0}"),
        a if a >= 100.0 => format!("{v:.1}"),
        a if a >= 0.1 => format!("{v:.2}"),
        _ => format!("{v:.4}"),
    }
}

fn with_interval(f: Option<Figure>) -> String {
    f.map_or_else(|| "-".into(), |f| format!("{} [{}, {}]", number(f.value), number(f.low), number(f.high)))
}

pub fn progress(m: &Measured) -> String {
    let r = &m.load;
    let mut line = format!(
        "{}, {}: {:.0} batches/s of {:.0} B = {:.1} MB/s",
        m.cell, m.variant, r.batches_per_s, r.mean_batch_bytes, r.mb_per_s
    );
    if let Some(b) = &r.broker {
        line += &format!(", {:.2} us/batch, {:.2} CPU-s/GB", b.cpu_us_per_batch, b.cpu_s_per_gb);
    }
    let l = &r.latency;
    line += &format!(", p50/p99/p99.9 {:.2}/{:.2}/{:.2} ms", l.p50_ms, l.p99_ms, l.p999_ms);
    if let Some(t) = &m.tail {
        line += &format!(", consumed {:.0} MB/s", t.mb_per_s);
    }
    if !r.errors.is_empty() || r.unanswered > 0 {
        line += &format!(", ERRORS {:?}, unanswered {}", r.errors, r.unanswered);
    }
    // The last ones due are still queued when the window ends.
    if r.config.mode == Mode::Open && r.unsent > r.batches / 1_000 {
        line += &format!(", {} never sent", r.unsent);
    }
    if r.config.mode == Mode::Open && r.generator_late.p99_ms > 1.0 && r.unsent == 0 {
        line += &format!(", generator late by {:.1} ms at p99", r.generator_late.p99_ms);
    }
    if m.disturbed {
        line += &format!(", DISTURBED: {:.0} % of the machine did something else", m.foreign_share * 100.0);
    }
    line
}

/// Everything of a row's cells, all rounds together, one line for each durability.
pub fn print_cells(s: &Session<'_>, row: u8) {
    let mut names: Vec<&str> = Vec::new();
    for m in s.measured.iter().filter(|m| m.row == row) {
        if !names.contains(&m.cell.as_str()) {
            names.push(&m.cell);
        }
    }
    if names.is_empty() {
        return;
    }
    println!(
        "  {:26} {:15} {:>9} {:>8} {:>8} {:>8} {:>8} {:>8} {:>8} {:>8} {:>6} {:>6} {:>8} {:>6}",
        "cell",
        "",
        "batches/s",
        "B/batch",
        "MB/s",
        "us/batch",
        "CPU-s/GB",
        "p50 ms",
        "p99 ms",
        "p99.9 ms",
        "RSS",
        "fds",
        "written",
        "others"
    );
    for name in names {
        for v in &ALL {
            let of: Vec<&Measured> = s.cells(row, name, v).collect();
            if of.is_empty() {
                continue;
            }
            let figure =
                |m: Measure| s.figure(row, name, v, m).map_or_else(|| "-".to_string(), |f| number(f.value));
            let most = |f: &dyn Fn(&Measured) -> Option<f64>| {
                let most = of.iter().filter_map(|m| f(m)).reduce(f64::max);
                most.map_or_else(|| "-".to_string(), number)
            };
            let batches: u64 = of.iter().map(|m| m.load.batches).sum();
            let bytes: f64 = of.iter().map(|m| m.load.mean_batch_bytes * m.load.batches as f64).sum();
            let broker = |f: &dyn Fn(&crate::load::Broker) -> Option<f64>, m: &Measured| {
                m.load.broker.as_ref().and_then(f)
            };
            println!(
                "  {:26} {:15} {:>9} {:>8.0} {:>8} {:>8} {:>8} {:>8} {:>8} {:>8} {:>6} {:>6} {:>8} {:>5.0}%{}",
                name,
                v.name,
                figure(Measure::BatchesPerS),
                bytes / (batches as f64).max(1.0),
                figure(Measure::DeliveredMbPerS),
                figure(Measure::CpuUsPerBatch),
                figure(Measure::CpuSPerGb),
                figure(Measure::Quantile(0.5)),
                figure(Measure::Quantile(0.99)),
                figure(Measure::Quantile(0.999)),
                most(&|m| broker(&|b| Some(b.rss_max_mib.round()), m)),
                most(&|m| broker(&|b| b.open_files.map(|n| n as f64), m)),
                most(&|m| {
                    let kernel = || broker(&|b| b.storage_bytes_per_batch_byte, m);
                    m.storage.and_then(|s| s.amplification()).or_else(kernel)
                }),
                of.iter().map(|m| m.foreign_share).fold(0.0, f64::max) * 100.0,
                if of.iter().any(|m| m.disturbed) { " DISTURBED" } else { "" },
            );
        }
    }
    println!(
        "  (medians over seconds of all rounds; MB/s, percentiles: all rounds together; RSS MiB, fds, written and others: \
         the largest;\n   written: bytes to storage by byte of batches, Flumen by its own counters, others by the kernel's; \
         others: the rest of the machine)"
    );
}

pub fn print_verdicts(verdicts: &[Verdict]) {
    let width = verdicts.iter().map(|v| v.what.chars().count()).max().unwrap_or(0);
    println!(
        "{:>3} {:width$}  {:>10} {:>10} {:>10}  {:>22}  {:>7}  {:20} whose",
        "row", "", "Flumen", "Kafka", "null", "judged [95 %]", "goal", ""
    );
    for v in verdicts {
        let plain = |f: Option<Figure>| f.map_or_else(|| "-".into(), |f| number(f.value));
        let goal = match v.goal {
            Goal::AtMost(x) => format!("<= {}", number(x)),
            Goal::AtLeast(x) => format!(">= {}", number(x)),
            Goal::Informs => String::new(),
        };
        println!(
            "{:>3} {:width$}  {:>10} {:>10} {:>10}  {:>22}  {:>7}  {:20} {}",
            v.row,
            v.what,
            plain(v.flumen),
            plain(v.kafka),
            plain(v.null),
            with_interval(v.judged),
            goal,
            v.outcome,
            v.sides
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outcomes() {
        let f = |value, low, high| Some(Figure { value, low, high });
        assert_eq!(outcome(Goal::AtMost(1.0), f(0.5, 0.4, 0.6)), "ok");
        assert_eq!(outcome(Goal::AtMost(1.0), f(0.9, 0.8, 1.1)), "ok, within noise");
        assert_eq!(outcome(Goal::AtMost(1.0), f(1.2, 0.8, 1.3)), "MISSED, within noise");
        assert_eq!(outcome(Goal::AtLeast(4.0), f(3.0, 2.9, 3.1)), "MISSED");
        assert_eq!(outcome(Goal::AtLeast(4.0), f(5.0, 4.5, 5.1)), "ok");
        assert_eq!(outcome(Goal::Informs, f(5.0, 4.5, 5.1)), "");
        assert_eq!(outcome(Goal::AtLeast(4.0), None), NOT_MEASURED);
    }

    #[test]
    fn a_ratio_that_could_not_be_formed_is_a_miss() {
        let none = Samples::Values(vec![]);
        let some = Samples::Values(vec![1.0]);
        let v = Verdict::ratio(1, "x", Goal::AtMost(1.0), (&DURABLE, &none), (&KAFKA, &some));
        assert!(v.missed());
        let mut met = Verdict::ratio(1, "x", Goal::Informs, (&DURABLE, &some), (&KAFKA, &some));
        assert!(!met.missed());
        met.spoil();
        assert!(met.missed());
        assert_eq!(v.sides, "Flumen durable / Kafka default");
    }
}
