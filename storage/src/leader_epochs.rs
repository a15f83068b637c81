//! Where each leader epoch starts: Kafka's leader epoch cache. Pure.

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct LeaderEpochs {
    /// (epoch, first offset written in it), both increasing.
    starts: Vec<(i32, i64)>,
}

impl LeaderEpochs {
    pub(crate) fn note(&mut self, epoch: i32, offset: i64) {
        while self.starts.last().is_some_and(|(_, start)| *start >= offset && *start > 0) {
            // A truncated tail is written again by a later epoch.
            if self.starts.last().is_some_and(|(e, _)| *e == epoch) {
                return;
            }
            self.starts.pop();
        }
        if self.starts.last().is_none_or(|(last, _)| *last < epoch) {
            self.starts.push((epoch, offset));
        }
    }

    /// The largest epoch not above `epoch` and the offset at which the next one starts.
    pub(crate) fn end_offset(&self, epoch: i32, log_end: i64) -> (i32, i64) {
        let next = self.starts.partition_point(|(e, _)| *e <= epoch);
        match next.checked_sub(1) {
            None => (-1, -1),
            Some(at) => (self.starts[at].0, self.starts.get(next).map_or(log_end, |(_, start)| *start)),
        }
    }

    pub(crate) fn at(&self, offset: i64) -> i32 {
        match self.starts.partition_point(|(_, start)| *start <= offset).checked_sub(1) {
            Some(at) => self.starts[at].0,
            None => self.starts.first().map_or(-1, |(e, _)| *e),
        }
    }

    pub(crate) fn starts(&self) -> &[(i32, i64)] {
        &self.starts
    }

    pub(crate) fn from_starts(starts: Vec<(i32, i64)>) -> LeaderEpochs {
        LeaderEpochs { starts }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_as_kafka_does() {
        let mut epochs = LeaderEpochs::default();
        for (epoch, offset) in [(1, 0), (1, 5), (3, 10), (3, 12), (7, 20)] {
            epochs.note(epoch, offset);
        }
        assert_eq!(epochs.starts(), [(1, 0), (3, 10), (7, 20)]);
        assert_eq!(epochs.end_offset(0, 30), (-1, -1));
        assert_eq!(epochs.end_offset(1, 30), (1, 10));
        assert_eq!(epochs.end_offset(2, 30), (1, 10));
        assert_eq!(epochs.end_offset(6, 30), (3, 20));
        assert_eq!(epochs.end_offset(7, 30), (7, 30));
        assert_eq!((epochs.at(0), epochs.at(9), epochs.at(10), epochs.at(25)), (1, 1, 3, 7));
    }
}
