//! What an operator does and meets, against the real engine: refusals, created tables, refused rows, replay, pause,
//! lost rows, changed tables.

mod support;

use std::time::Duration;

use flumen_sink::admission::{Guarantee, admit};
use flumen_sink::config::ExportConfig;
use flumen_sink::exporter::{ResetError, ResetTo};
use flumen_sink::status::State;
use serde::Deserialize;
use support::{Engine, Fault, MemoryLog, MemoryTopic, Proxy, Running, config, until_settled};

fn run<F: Future<Output = ()>>(test: F) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    tokio::task::LocalSet::new().block_on(&runtime, test);
}

#[derive(Deserialize)]
struct Count {
    n: u64,
}

async fn count(engine: &Engine, what: &str, from: &str) -> u64 {
    let rows: Vec<Count> =
        engine.client().rows(&format!("SELECT {what} AS n FROM {from}")).await.expect("a count");
    rows[0].n
}

async fn sql(engine: &Engine, statement: &str) {
    engine.client().execute(statement).await.unwrap_or_else(|e| panic!("{statement}: {e}"));
}

fn values(ids: std::ops::Range<i64>) -> Vec<Option<String>> {
    ids.map(|id| Some(format!("{{\"id\":{id}}}"))).collect()
}

async fn until(running: &Running, state: State) {
    while running.handle.status().state != state {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

const CREATE: &[(&str, &str)] =
    &[("auto.create", "true"), ("columns", "id Int64"), ("target.lag.ms", "50"), ("audit.interval.ms", "0")];

fn created(topic: &str, more: &[(&str, &str)]) -> ExportConfig {
    config(topic, &[CREATE, more].concat())
}

#[test]
fn admission_of_real_tables() {
    run(async {
        let engine = Engine::start();
        let server = engine.client();
        for statement in [
            "CREATE TABLE plain (id Int64, _partition Int32, _offset Int64) ENGINE = MergeTree ORDER BY id \
             SETTINGS non_replicated_deduplication_window = 100",
            "CREATE TABLE no_window (id Int64, _partition Int32, _offset Int64) ENGINE = MergeTree ORDER BY id",
            "CREATE TABLE source (id Int64, _partition Int32, _offset Int64) ENGINE = MergeTree ORDER BY id \
             SETTINGS non_replicated_deduplication_window = 100",
            "CREATE TABLE target (id Int64) ENGINE = MergeTree ORDER BY id",
            "CREATE MATERIALIZED VIEW view TO target AS SELECT id FROM source",
            "CREATE MATERIALIZED VIEW inner_view (n UInt64) ENGINE = SummingMergeTree ORDER BY tuple() \
             AS SELECT count() AS n FROM source",
            "CREATE TABLE expiring (id Int64, at DateTime, _partition Int32, _offset Int64) ENGINE = MergeTree \
             ORDER BY (_partition, _offset) TTL at + INTERVAL 1 DAY \
             SETTINGS non_replicated_deduplication_window = 100",
            "CREATE TABLE replacing (id Int64, _partition Int32, _offset Int64) ENGINE = ReplacingMergeTree \
             ORDER BY id SETTINGS non_replicated_deduplication_window = 100",
            "CREATE TABLE logs (id Int64, _partition Int32, _offset Int64) ENGINE = Log",
        ] {
            sql(&engine, statement).await;
        }
        let judge = async |table: &str, more: &[(&str, &str)]| {
            let config = config("orders", &[&[("table", table)], more].concat());
            admit(&server, "default", &config, &[]).await.expect("an answer")
        };
        let plain = judge("plain", &[]).await;
        assert_eq!(plain.guarantee, Guarantee::ExactlyOnce, "{:?}", plain.reasons);
        assert!(plain.warnings.iter().any(|w| w.contains("_offset_minmax")), "{:?}", plain.warnings);

        let refused = judge("no_window", &[]).await;
        assert!(!refused.admitted);
        // The sentence it offers is one the server takes, and it lifts the refusal.
        sql(&engine, &refused.fixes[0]).await;
        assert!(judge("no_window", &[]).await.admitted);

        let views = judge("source", &[]).await;
        assert!(views.reasons.iter().any(|r| r.contains("`target`")), "{:?}", views.reasons);
        assert!(views.reasons.iter().any(|r| r.contains("`.inner_id.")), "{:?}", views.reasons);
        assert!(views.reasons.iter().any(|r| r.contains("plain MergeTree")), "{:?}", views.reasons);
        for fix in &views.fixes {
            sql(&engine, fix).await;
        }
        let token = judge("source", &[("delivery", "token_only")]).await;
        assert!(token.admitted, "{:?}", token.reasons);
        let warned = judge("source", &[("views", "warn")]).await;
        assert_eq!(warned.guarantee, Guarantee::ExactlyOnceTableOnly, "{:?}", warned.reasons);

        assert!(judge("expiring", &[]).await.rows_may_vanish);
        assert!(!judge("replacing", &[]).await.admitted);
        assert!(!judge("logs", &[]).await.admitted);
        assert!(judge("logs", &[("delivery", "at_least_once")]).await.admitted);
        assert!(judge("absent", &[]).await.reasons[0].contains("does not exist"));
        let no_database = config("orders", &[]);
        let error = admit(&server, "nowhere", &no_database, &[]).await.expect_err("no such database");
        assert_eq!(error.code, Some(81));
    });
}

#[test]
fn table_from_the_first_records() {
    run(async {
        let engine = Engine::start();
        let topic = MemoryTopic::new(1);
        let log = MemoryLog::default();
        let config = config("sampled", &[("auto.create", "true"), ("target.lag.ms", "50")]);
        let export = Running::start(&topic, &log, &config, &engine.url());
        while !export.handle.status().reason.contains("first record") {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert_eq!(export.handle.status().last_error, None, "nothing is wrong with an empty topic");
        topic.produce(0, &[Some("{\"id\":7,\"name\":\"x\",\"price\":1.5}".to_owned()), None]);
        until(&export, State::Running).await;
        until_settled(&export, &topic).await;
        let status = export.handle.status();
        assert_eq!((status.rows_total, status.skipped_total), (1, 1));
        assert_eq!(status.guarantee, Some(Guarantee::ExactlyOnce));
        export.stop().await;
        assert_eq!(count(&engine, "count()", "sampled WHERE id = 7 AND name = 'x' AND price = 1.5").await, 1);
    });
}

#[test]
fn rows_the_server_refuses_are_found_one_by_one() {
    run(async {
        let engine = Engine::start();
        sql(
            &engine,
            "CREATE TABLE picky (id Int64, _partition Int32, _offset Int64, CONSTRAINT fine CHECK id % 100 != 42) \
             ENGINE = MergeTree ORDER BY id SETTINGS non_replicated_deduplication_window = 1000",
        )
        .await;
        let topic = MemoryTopic::new(2);
        topic.produce(0, &values(0..150));
        topic.produce(1, &values(150..300));
        topic.produce(1, &[Some("{\"id\":\"x\"}".to_owned())]);
        let log = MemoryLog::default();
        let config = config("picky", &[("target.lag.ms", "50"), ("max.inserts.per.second", "100")]);
        let export = Running::start(&topic, &log, &config, &engine.url());
        until_settled(&export, &topic).await;
        export.stop().await;
        assert_eq!(count(&engine, "count()", "picky").await, 297);
        assert_eq!(count(&engine, "uniqExact(id)", "picky").await, 297);
        let letters = topic.dead_letters();
        let header = |at: usize, name: &str| {
            let value = letters[at].headers.iter().find(|(n, _)| n == name).map(|(_, v)| v.clone());
            String::from_utf8(value.expect(name)).expect("text")
        };
        assert_eq!(letters.len(), 4);
        let mut codes: Vec<String> = (0..4).map(|at| header(at, "ch.error.code")).collect();
        codes.sort();
        assert_eq!(
            codes,
            [
                "REFUSED_BY_CLICKHOUSE_469",
                "REFUSED_BY_CLICKHOUSE_469",
                "REFUSED_BY_CLICKHOUSE_469",
                "WRONG_TYPE"
            ]
        );
        for at in 0..4 {
            assert_eq!(header(at, "ch.topic"), "picky");
            assert_eq!(header(at, "h"), "v");
            header(at, "ch.plan.seq");
            header(at, "ch.offset");
        }
    });
}

#[test]
fn a_table_that_refuses_everything_stops_the_export() {
    run(async {
        let engine = Engine::start();
        sql(
            &engine,
            "CREATE TABLE closed (id Int64, _partition Int32, _offset Int64, CONSTRAINT never CHECK id < 0) \
             ENGINE = MergeTree ORDER BY id SETTINGS non_replicated_deduplication_window = 1000",
        )
        .await;
        let topic = MemoryTopic::new(1);
        topic.produce(0, &values(0..400));
        let log = MemoryLog::default();
        let config = config("closed", &[("target.lag.ms", "50"), ("max.inserts.per.second", "100")]);
        let export = Running::start(&topic, &log, &config, &engine.url());
        until(&export, State::Failed).await;
        let error = export.handle.status().last_error.clone().expect("a reason");
        assert!(error.message.contains("100 rows in a row"), "{}", error.message);
        assert!(topic.dead_letters().len() <= 100, "the topic was emptied into the dead letters");
        export.stop().await;
    });
}

#[test]
fn replay_inserts_only_what_is_missing() {
    run(async {
        let engine = Engine::start();
        let topic = MemoryTopic::new(2);
        let log = MemoryLog::default();
        let config = created("replay", &[("flush.rows", "100")]);
        let export = Running::start(&topic, &log, &config, &engine.url());
        topic.produce(0, &values(0..500));
        topic.produce(1, &values(500..1000));
        until_settled(&export, &topic).await;
        let refused = export.handle.reset(vec![(0, ResetTo::Earliest)]).await.expect("running");
        assert_eq!(refused, Err(ResetError::Running));
        export.handle.pause("a test").await.expect("running");
        until(&export, State::Paused).await;
        sql(&engine, "ALTER TABLE replay DELETE WHERE id % 10 = 3 SETTINGS mutations_sync = 1").await;
        assert_eq!(count(&engine, "count()", "replay").await, 900);
        let refused = export.handle.reset(vec![(0, ResetTo::Offset(501))]).await.expect("running");
        assert_eq!(
            refused,
            Err(ResetError::OutOfRange { partition: 0, offset: 501, earliest: 0, latest: 500 })
        );
        let refused = export.handle.reset(vec![(2, ResetTo::Earliest)]).await.expect("running");
        assert_eq!(refused, Err(ResetError::NoPartition(2)));
        let back = vec![(0, ResetTo::Earliest), (1, ResetTo::Offset(0))];
        export.handle.reset(back).await.expect("running").expect("reset");
        assert_eq!(export.handle.status().sink_epoch, 2);
        assert!(!topic.all_settled());
        export.handle.resume().await.expect("running");
        topic.produce(0, &values(1000..1200));
        until_settled(&export, &topic).await;
        export.stop().await;
        assert_eq!(count(&engine, "count()", "replay").await, 1200);
        assert_eq!(count(&engine, "uniqExact(id)", "replay").await, 1200);
    });
}

#[test]
fn a_record_on_its_way_when_the_export_is_interrupted_is_not_forgotten() {
    run(async {
        let engine = Engine::start();
        let topic = MemoryTopic::new(1);
        let log = MemoryLog::default();
        let config = created("interrupted", &[]);
        let export = Running::start(&topic, &log, &config, &engine.url());
        topic.produce(0, &values(0..10));
        until_settled(&export, &topic).await;
        // The disk stalls under a record; meanwhile the export is paused, which cuts what it was doing short.
        log.stall();
        topic.produce(0, &values(10..20));
        while log.waiting() == 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        export.handle.pause("a test").await.expect("running");
        tokio::time::sleep(Duration::from_millis(2500)).await;
        log.release();
        until(&export, State::Paused).await;
        export.handle.resume().await.expect("running");
        topic.produce(0, &values(20..30));
        until_settled(&export, &topic).await;
        export.stop().await;
        // Replay would refuse a log in which a record stands twice.
        let export = Running::start(&topic, &log, &config, &engine.url());
        topic.produce(0, &values(30..40));
        until_settled(&export, &topic).await;
        export.stop().await;
        assert_eq!(count(&engine, "count()", "interrupted").await, 40);
        assert_eq!(count(&engine, "uniqExact(id)", "interrupted").await, 40);
    });
}

#[test]
fn a_reset_settles_what_is_on_its_way_first() {
    run(async {
        let engine = Engine::start();
        let proxy = Proxy::start(engine.port, 9, Duration::from_millis(3500)).await;
        let topic = MemoryTopic::new(1);
        let log = MemoryLog::default();
        let config = created("hasty", &[("insert.timeout.ms", "200")]);
        let export = Running::start(&topic, &log, &config, &proxy.url());
        topic.produce(0, &values(0..10));
        until_settled(&export, &topic).await;
        // An insert that arrives long after the export gave up on it.
        proxy.set_faults(&[Fault::Late]);
        topic.produce(0, &values(10..20));
        while proxy.happened(Fault::Late) == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        proxy.set_faults(&[]);
        export.handle.pause("a test").await.expect("running");
        until(&export, State::Paused).await;
        export.handle.reset(vec![(0, ResetTo::Earliest)]).await.expect("running").expect("reset");
        assert_eq!(export.handle.status().state, State::Paused);
        export.handle.resume().await.expect("running");
        until_settled(&export, &topic).await;
        // Its request is answered when it has arrived.
        while proxy.answered(Fault::Late) == 0 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        export.stop().await;
        assert_eq!(count(&engine, "count()", "hasty").await, 20);
        assert_eq!(count(&engine, "uniqExact(id)", "hasty").await, 20);
    });
}

#[test]
fn idle_exports_write_a_snapshot_when_asked() {
    run(async {
        let engine = Engine::start();
        let topic = MemoryTopic::new(1);
        let log = MemoryLog::default();
        let config = created("idle", &[]);
        for pause in [false, true] {
            let export = Running::start(&topic, &log, &config, &engine.url());
            topic.produce(0, &values(0..10));
            until_settled(&export, &topic).await;
            if pause {
                export.handle.pause("a test").await.expect("running");
                until(&export, State::Paused).await;
            }
            let before = log.records().len();
            assert!(before > 1);
            export.handle.want_snapshot();
            while log.records().len() != 1 {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            export.stop().await;
        }
        // The snapshot alone is enough to go on.
        let export = Running::start(&topic, &log, &config, &engine.url());
        topic.produce(0, &values(20..30));
        until_settled(&export, &topic).await;
        export.stop().await;
        assert_eq!(count(&engine, "count()", "idle").await, 30);
    });
}

#[test]
fn lost_rows_come_back_by_the_audit() {
    run(async {
        let mut engine = Engine::start();
        let topic = MemoryTopic::new(1);
        let log = MemoryLog::default();
        let mut pairs = CREATE.to_vec();
        pairs.extend([("audit.interval.ms", "200"), ("partition.by", "id % 5")]);
        let export = Running::start(&topic, &log, &config("audited", &pairs), &engine.url());
        topic.produce(0, &values(0..1000));
        until_settled(&export, &topic).await;
        // A part that the file system lost in a crash of the host: gone without a mutation.
        sql(&engine, "ALTER TABLE audited DROP PARTITION 3").await;
        assert_eq!(count(&engine, "count()", "audited").await, 800);
        engine.kill();
        engine.run();
        while export.handle.status().audit.repaired_rows < 200 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert_eq!(count(&engine, "count()", "audited").await, 1000);
        assert_eq!(count(&engine, "uniqExact(id)", "audited").await, 1000);
        let audit = export.handle.status().audit.clone();
        assert_eq!((audit.missing_rows, audit.duplicate_rows), (200, 0));
        export.stop().await;
    });
}

#[test]
fn lost_offsets_stop_the_export_until_it_is_told() {
    run(async {
        let engine = Engine::start();
        let topic = MemoryTopic::new(1);
        let log = MemoryLog::default();
        let config = created("cut", &[]);
        let export = Running::start(&topic, &log, &config, &engine.url());
        topic.produce(0, &values(0..10));
        until_settled(&export, &topic).await;
        export.stop().await;
        for at in 1..4 {
            topic.produce(0, &values(at * 10..at * 10 + 10));
        }
        topic.cut(0, 20);
        let export = Running::start(&topic, &log, &config, &engine.url());
        until(&export, State::Failed).await;
        let error = export.handle.status().last_error.clone().expect("a reason");
        assert!(error.message.contains("next offset to export is 10"), "{}", error.message);
        assert!(error.hint.contains("flumen export reset cut --partition 0 --to-earliest"), "{}", error.hint);
        export.handle.reset(vec![(0, ResetTo::Earliest)]).await.expect("running").expect("reset");
        until(&export, State::Running).await;
        until_settled(&export, &topic).await;
        export.stop().await;
        assert_eq!(count(&engine, "count()", "cut").await, 30);
    });
}

#[test]
fn new_exports_do_not_double_rows_that_are_there() {
    run(async {
        let engine = Engine::start();
        let topic = MemoryTopic::new(1);
        topic.produce(0, &values(0..50));
        let first = Running::start(&topic, &MemoryLog::default(), &created("again", &[]), &engine.url());
        until_settled(&first, &topic).await;
        first.stop().await;
        topic.produce(0, &values(50..80));
        // The export was deleted and made anew: its state is gone, the rows are there.
        let log = MemoryLog::default();
        let second = Running::start(&topic, &log, &created("again", &[]), &engine.url());
        until(&second, State::Failed).await;
        let error = second.handle.status().last_error.clone().expect("a reason");
        assert!(error.message.contains("already holds 50 rows"), "{}", error.message);
        second.stop().await;
        let trusting = created("again", &[("existing.rows", "trust")]);
        let third = Running::start(&topic, &log, &trusting, &engine.url());
        until_settled(&third, &topic).await;
        third.stop().await;
        assert_eq!(count(&engine, "count()", "again").await, 80);
    });
}

#[test]
fn table_and_topic_may_grow_while_exporting() {
    run(async {
        let engine = Engine::start();
        let topic = MemoryTopic::new(1);
        let log = MemoryLog::default();
        let export = Running::start(&topic, &log, &created("growing", &[]), &engine.url());
        topic.produce(0, &values(0..10));
        until_settled(&export, &topic).await;
        export.crash().await;
        sql(&engine, "ALTER TABLE growing ADD COLUMN extra Nullable(String)").await;
        let export = Running::start(&topic, &log, &created("growing", &[]), &engine.url());
        topic.add_partition();
        topic.produce(1, &[Some("{\"id\":100,\"extra\":\"new\"}".to_owned())]);
        until_settled(&export, &topic).await;
        export.stop().await;
        assert_eq!(count(&engine, "countIf(extra = 'new')", "growing").await, 1);
        assert_eq!(count(&engine, "count()", "growing").await, 11);
    });
}

#[test]
fn an_absent_server_is_waited_for() {
    run(async {
        let mut engine = Engine::start();
        let topic = MemoryTopic::new(1);
        let log = MemoryLog::default();
        let export = Running::start(&topic, &log, &created("patient", &[]), &engine.url());
        topic.produce(0, &values(0..10));
        until_settled(&export, &topic).await;
        engine.kill();
        topic.produce(0, &values(10..20));
        until(&export, State::BackingOff).await;
        let status = export.handle.status();
        let error = status.last_error.clone().expect("a reason");
        assert!(error.hint.contains("keeps trying") || error.hint.contains("looked up"), "{error:?}");
        while export.handle.status().breaker != Some(flumen_sink::breaker::BreakerState::Open) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert_eq!(export.handle.status().lag_records, 10);
        engine.run();
        until_settled(&export, &topic).await;
        until(&export, State::Running).await;
        export.stop().await;
        assert_eq!(count(&engine, "count()", "patient").await, 20);
        let samples = flumen_sink::status::ExportMetrics::default().samples();
        assert!(samples.iter().all(|s| s.name.starts_with("flumen_export_")));
    });
}

#[test]
fn token_only_without_offset_columns() {
    run(async {
        let engine = Engine::start();
        sql(
            &engine,
            "CREATE TABLE bare (id Int64) ENGINE = MergeTree ORDER BY id SETTINGS \
             non_replicated_deduplication_window = 1000",
        )
        .await;
        let topic = MemoryTopic::new(3);
        for at in 0..3 {
            topic.produce(at, &values(at as i64 * 100..at as i64 * 100 + 100));
        }
        let log = MemoryLog::default();
        let config = config("bare", &[("delivery", "token_only"), ("target.lag.ms", "50")]);
        let export = Running::start(&topic, &log, &config, &engine.url());
        until_settled(&export, &topic).await;
        assert_eq!(export.handle.status().guarantee, Some(Guarantee::TokenOnly));
        export.stop().await;
        assert_eq!(count(&engine, "count()", "bare").await, 300);
    });
}
