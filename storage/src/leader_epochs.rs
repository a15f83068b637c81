//! At which offset each leader epoch (Raft term) began: what OffsetForLeaderEpoch answers from. Pure.

/// A change of leader adds one entry of 12 bytes, which is carried in every group state. The oldest go first; asking for
/// them then answers as for epochs before the log's beginning.
pub const MAX_EPOCHS: usize = 64;

#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LeaderEpochs {
    entries: Vec<(i32, i64)>,
}

impl LeaderEpochs {
    pub fn entries(&self) -> &[(i32, i64)] {
        &self.entries
    }

    /// A batch of `epoch` was appended at `offset`; only the first of an epoch matters.
    pub fn assign(&mut self, epoch: i32, offset: i64) {
        if self.entries.last().is_some_and(|(last, _)| *last >= epoch) {
            return;
        }
        // Epochs that began here and got no batch left no trace.
        while self.entries.last().is_some_and(|(_, start)| *start >= offset) {
            self.entries.pop();
        }
        if self.entries.len() == MAX_EPOCHS {
            self.entries.remove(0);
        }
        self.entries.push((epoch, offset));
    }

    /// Largest epoch not above `epoch`, and where it ends; (-1, -1) for no epoch. Whoever asks here for an epoch above
    /// every one that has a batch asks for one that led and wrote nothing: the log up to its end is from before it.
    pub fn end_offset(&self, epoch: i32, log_end: i64) -> (i32, i64) {
        if epoch < 0 {
            return (-1, -1);
        }
        let after = self.entries.partition_point(|(known, _)| *known <= epoch);
        match (after.checked_sub(1).and_then(|at| self.entries.get(at)), self.entries.get(after)) {
            (Some((known, _)), Some((_, next_start))) => (*known, *next_start),
            (Some((known, _)), None) => (*known, log_end),
            (None, None) => (epoch, log_end),
            // Below everything known: as Kafka, the asked epoch ends where the first known one begins.
            (None, Some((_, next_start))) => (epoch, *next_start),
        }
    }

    /// Epoch of the record at `offset`; -1 when unknown.
    pub fn epoch_at(&self, offset: i64) -> i32 {
        let after = self.entries.partition_point(|(_, start)| *start <= offset);
        after.checked_sub(1).and_then(|at| self.entries.get(at)).map_or(-1, |(epoch, _)| *epoch)
    }

    /// Epoch of the record before `offset`.
    pub fn epoch_before(&self, offset: i64) -> Option<u64> {
        u64::try_from(self.epoch_at(offset.checked_sub(1)?)).ok()
    }

    pub fn truncate_end(&mut self, offset: i64) {
        self.entries.retain(|(_, start)| *start < offset);
    }

    /// The log begins at `offset` now. Forgets epochs that lie wholly below the record before, of which snapshots of producers
    /// that end at `offset` tell; the one that this was of now begins there.
    pub fn truncate_start(&mut self, offset: i64) {
        let before = offset.saturating_sub(1);
        let after = self.entries.partition_point(|(_, start)| *start <= before);
        if let Some(first) = after.checked_sub(1) {
            self.entries.drain(..first);
            if let Some((_, start)) = self.entries.first_mut() {
                *start = before;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_as_kafka_does() {
        let mut epochs = LeaderEpochs::default();
        assert_eq!(epochs.end_offset(0, 0), (0, 0));
        for (epoch, offset) in [(2, 0), (2, 10), (4, 20), (7, 50)] {
            epochs.assign(epoch, offset);
        }
        assert_eq!(epochs.end_offset(2, 90), (2, 20));
        assert_eq!(epochs.end_offset(3, 90), (2, 20));
        assert_eq!(epochs.end_offset(6, 90), (4, 50));
        assert_eq!(epochs.end_offset(7, 90), (7, 90));
        assert_eq!(epochs.end_offset(8, 90), (7, 90));
        assert_eq!(epochs.end_offset(1, 90), (1, 0));
        assert_eq!(epochs.end_offset(-1, 90), (-1, -1));
        assert_eq!((epochs.epoch_at(19), epochs.epoch_at(20), epochs.epoch_at(1000)), (2, 4, 7));
        epochs.truncate_start(30);
        assert_eq!(epochs.entries(), [(4, 29), (7, 50)]);
        assert_eq!((epochs.epoch_at(28), epochs.epoch_at(29)), (-1, 4));
        assert_eq!((epochs.end_offset(3, 90), epochs.end_offset(4, 90)), ((3, 29), (4, 50)));
        epochs.truncate_end(50);
        assert_eq!(epochs.entries(), [(4, 29)]);
        epochs.assign(9, 30);
        assert_eq!(epochs.entries(), [(4, 29), (9, 30)]);
        for epoch in 10..200 {
            epochs.assign(epoch, i64::from(epoch) * 10);
        }
        assert_eq!(epochs.entries().len(), MAX_EPOCHS);
    }
}
