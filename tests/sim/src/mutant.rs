//! Deliberate faults of the shell around a group; those of the boundary itself are in `flumen_raft::mutant`.

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DriverMutant {
    /// Answers when the leader's own disk has it.
    AcknowledgesBeforeMajority,
    /// Answers when Raft has taken it.
    AcknowledgesProposals,
    /// A leader gives offsets from where it thought the log ends when it led before.
    KeepsOffsets,
    /// A refused proposal moves the log end offset.
    MovesOffsetWhenRefused,
    /// The disk keeps what was replaced.
    SkipsTruncation,
    /// Tells of entries as stored before the sync is done.
    ReportsBeforeSync,
    /// Gives records to consumers up to the end of the log.
    ServesUncommitted,
    /// Answers where the log ends without asking whether it still leads.
    ReadsWithoutConfirming,
    /// Starts with the members that the group was created with.
    ForgetsMembers,
    /// Loses the vote, not the term, in a restart.
    LosesVote,
    /// Takes messages of one group for those of another now and then.
    MixesGroups,
}

pub const DRIVER_MUTANTS: [DriverMutant; 11] = [
    DriverMutant::AcknowledgesBeforeMajority,
    DriverMutant::AcknowledgesProposals,
    DriverMutant::KeepsOffsets,
    DriverMutant::MovesOffsetWhenRefused,
    DriverMutant::SkipsTruncation,
    DriverMutant::ReportsBeforeSync,
    DriverMutant::ServesUncommitted,
    DriverMutant::ReadsWithoutConfirming,
    DriverMutant::ForgetsMembers,
    DriverMutant::LosesVote,
    DriverMutant::MixesGroups,
];
