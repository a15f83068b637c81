//! Medians and quantiles with 95 % intervals, from slices of a window or from one value per round.
//!
//! Pure. Intervals come from the bootstrap: slices are drawn again with replacement and the figure is computed anew, so a
//! percentile is always one of a merged histogram. The seed is fixed: the same slices give the same interval.

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde::Serialize;

use crate::load::Slice;

/// Resamples per interval: the 2.5 % tails then rest on ten of them.
const RESAMPLES: usize = 400;
const SEED: u64 = 4_301;

/// What is read off slices.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Measure {
    /// Median over slices of CPU per batch.
    CpuUsPerBatch,
    CpuSPerGb,
    /// Median over slices of batches per second of the broker's CPU.
    BatchesPerCpuS,
    /// Median over slices.
    BatchesPerS,
    /// All bytes by all seconds, so that a second without any counts.
    DeliveredMbPerS,
    /// The same in records, which counts no batch header as delivery.
    DeliveredRecordsPerS,
    /// Of all latencies together, in milliseconds.
    Quantile(f64),
}

/// Slices of all rounds with the measure that reads them, or one value per round.
#[derive(Debug, Clone)]
pub enum Samples<'a> {
    Slices(Vec<&'a Slice>, Measure),
    Values(Vec<f64>),
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Figure {
    pub value: f64,
    pub low: f64,
    pub high: f64,
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.retain(|v| v.is_finite());
    values.sort_by(f64::total_cmp);
    let n = values.len();
    match n {
        0 => None,
        n if n % 2 == 1 => Some(values[n / 2]),
        n => Some((values[n / 2 - 1] + values[n / 2]) / 2.0),
    }
}

fn quantile_ms(slices: &[&Slice], q: f64) -> Option<f64> {
    let mut all: Vec<(u64, u64)> = slices.iter().flat_map(|s| s.latency_us.iter().copied()).collect();
    all.sort_unstable();
    let total: u64 = all.iter().map(|(_, n)| n).sum();
    let rank = ((total as f64 * q).ceil() as u64).max(1);
    let mut seen = 0;
    all.iter()
        .find(|(_, n)| {
            seen += n;
            seen >= rank
        })
        .map(|(us, _)| *us as f64 / 1000.0)
}

fn read(slices: &[&Slice], measure: Measure) -> Option<f64> {
    let each = |f: &dyn Fn(&Slice) -> Option<f64>| median(slices.iter().filter_map(|s| f(s)).collect());
    let per_second = |f: &dyn Fn(&Slice) -> f64| {
        let seconds: f64 = slices.iter().map(|s| s.seconds).sum();
        (seconds > 0.0).then(|| slices.iter().map(|s| f(s)).sum::<f64>() / seconds)
    };
    let cpu_per = |s: &Slice, n: u64| Some(s.broker_cpu_s? / n as f64).filter(|_| n > 0);
    match measure {
        Measure::CpuUsPerBatch => each(&|s| Some(cpu_per(s, s.batches)? * 1e6)),
        Measure::CpuSPerGb => each(&|s| Some(cpu_per(s, s.bytes)? * 1e9)),
        Measure::BatchesPerCpuS => each(&|s| Some(1.0 / cpu_per(s, s.batches)?)),
        Measure::BatchesPerS => each(&|s| Some(s.batches as f64 / s.seconds)),
        Measure::DeliveredMbPerS => per_second(&|s| s.bytes as f64 / 1e6),
        Measure::DeliveredRecordsPerS => per_second(&|s| s.records as f64),
        Measure::Quantile(q) => quantile_ms(slices, q),
    }
}

impl Samples<'_> {
    fn estimate(&self) -> Option<f64> {
        match self {
            Samples::Slices(slices, measure) => read(slices, *measure),
            Samples::Values(values) => median(values.clone()),
        }
    }

    fn resampled(&self, rng: &mut StdRng) -> Option<f64> {
        fn draw<T: Copy>(from: &[T], rng: &mut StdRng) -> Vec<T> {
            (0..from.len()).map(|_| from[rng.random_range(0..from.len())]).collect()
        }
        match self {
            Samples::Slices(slices, measure) => read(&draw(slices, rng), *measure),
            Samples::Values(values) => median(draw(values, rng)),
        }
    }

    pub fn figure(&self) -> Option<Figure> {
        interval(self.estimate()?, |rng| self.resampled(rng))
    }

    /// This by that, each drawn anew on its own.
    pub fn ratio(&self, to: &Samples<'_>) -> Option<Figure> {
        let by = |a: Option<f64>, b: Option<f64>| Some(a? / b?).filter(|r| r.is_finite());
        interval(by(self.estimate(), to.estimate())?, |rng| by(self.resampled(rng), to.resampled(rng)))
    }
}

fn interval(value: f64, mut resample: impl FnMut(&mut StdRng) -> Option<f64>) -> Option<Figure> {
    let mut rng = StdRng::seed_from_u64(SEED);
    let mut drawn: Vec<f64> = (0..RESAMPLES).filter_map(|_| resample(&mut rng)).collect();
    drawn.sort_by(f64::total_cmp);
    let at = |q: f64| drawn.get(((drawn.len() as f64 * q) as usize).min(drawn.len() - 1)).copied();
    if drawn.is_empty() {
        return None;
    }
    Some(Figure { value, low: at(0.025)?.min(value), high: at(0.975)?.max(value) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::Latency;

    fn slice(batches: u64, cpu: f64, latency_us: Vec<(u64, u64)>) -> Slice {
        Slice {
            seconds: 1.0,
            batches,
            records: batches,
            bytes: batches * 1_000,
            broker_cpu_s: Some(cpu),
            latency: Latency::default(),
            latency_us,
        }
    }

    #[test]
    fn medians_ignore_one_odd_second_and_delivery_does_not() {
        let slices = [slice(1_000, 0.5, vec![]), slice(1_000, 0.5, vec![]), slice(10, 0.5, vec![])];
        let of = |m| Samples::Slices(slices.iter().collect(), m).figure().unwrap();
        assert_eq!(of(Measure::BatchesPerS).value, 1_000.0);
        assert_eq!(of(Measure::CpuUsPerBatch).value, 500.0);
        assert_eq!(of(Measure::BatchesPerCpuS).value, 2_000.0);
        assert_eq!(of(Measure::CpuSPerGb).value, 500.0);
        assert!((of(Measure::DeliveredMbPerS).value - 0.67).abs() < 1e-9);
    }

    #[test]
    fn quantiles_are_those_of_the_merged_latencies() {
        let slices = [slice(0, 0.0, vec![(1_000, 990)]), slice(0, 0.0, vec![(1_000, 9), (50_000, 1)])];
        let of = |q| Samples::Slices(slices.iter().collect(), Measure::Quantile(q)).figure().unwrap();
        assert_eq!(of(0.5).value, 1.0);
        assert_eq!(of(0.999).value, 1.0);
        assert_eq!(of(1.0).value, 50.0);
    }

    #[test]
    fn ratios_and_intervals() {
        let a = Samples::Values(vec![2.0, 2.2]);
        let b = Samples::Values(vec![4.0, 4.0]);
        let r = a.ratio(&b).unwrap();
        assert!((r.value - 0.525).abs() < 1e-9);
        assert!(r.low >= 0.5 - 1e-9 && r.high <= 0.55 + 1e-9 && r.low < r.high);
        assert_eq!(a.ratio(&b), a.ratio(&b));
        assert_eq!(Samples::Values(vec![]).figure(), None);
        assert_eq!(a.ratio(&Samples::Values(vec![0.0])), None);
    }

    #[test]
    fn slices_without_batches_or_cpu_are_left_out() {
        let mut idle = slice(0, 0.1, vec![]);
        assert_eq!(Samples::Slices(vec![&idle], Measure::CpuUsPerBatch).figure(), None);
        idle.broker_cpu_s = None;
        idle.batches = 5;
        assert_eq!(Samples::Slices(vec![&idle], Measure::CpuUsPerBatch).figure(), None);
    }
}
