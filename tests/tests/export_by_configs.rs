//! An export turned on, changed, looked at, replayed and turned off with nothing but what every Kafka installation has:
//! topic configurations and consumer groups.

use flumen_tests::clickhouse::ClickHouse;
use flumen_tests::export::{until, until_settled, until_state};
use flumen_tests::flumen::Flumen;
use flumen_tests::kafka::{Sender, java_tools, kafka_tool, librdkafka_admin};
use flumen_tests::process::free_port;
use serde_json::json;

const CONFIGS: &str = "kafka.admin.ConfigCommand";
const GROUPS: &str = "org.apache.kafka.tools.consumer.group.ConsumerGroupCommand";

struct Lab {
    broker: Flumen,
    clickhouse: ClickHouse,
    sender: Sender,
    sent: u64,
    _dir: tempfile::TempDir,
}

impl Lab {
    fn new(topic: &str) -> Lab {
        let dir = tempfile::tempdir().unwrap();
        let clickhouse = ClickHouse::start_own(dir.path(), free_port()).unwrap();
        let url = format!("clickhouse.url={}", clickhouse.url);
        let broker = Flumen::start(dir.path(), &[&url]).unwrap();
        broker.create_topic(topic, 3, &json!({})).unwrap();
        let sender = Sender::new(&broker.kafka, &[]).unwrap();
        Lab { broker, clickhouse, sender, sent: 0, _dir: dir }
    }

    fn produce(&mut self, topic: &str, count: u64) {
        for id in self.sent..self.sent + count {
            let value = json!({ "id": id, "price": "9.90" }).to_string();
            self.sender.send(topic, &id.to_string(), value.as_bytes(), id).unwrap();
        }
        self.sent += count;
        self.sender.flush().unwrap();
    }

    /// Rows, distinct offsets, distinct ids.
    fn counts(&self, table: &str) -> String {
        let sql = format!("SELECT count(), uniqExact(_partition, _offset), uniqExact(id) FROM {table}");
        self.clickhouse.query(&sql).unwrap().trim().to_string()
    }

    fn tool(&self, class: &str, arguments: &[&str]) -> (bool, String) {
        let with_server = [&["--bootstrap-server", &self.broker.kafka], arguments].concat();
        kafka_tool(class, &with_server).unwrap()
    }

    fn configs(&self, topic: &str, change: &[&str]) -> (bool, String) {
        let head = ["--alter", "--entity-type", "topics", "--entity-name", topic];
        self.tool(CONFIGS, &[&head, change].concat())
    }

    fn admin(&self, arguments: &[&str]) -> String {
        librdkafka_admin(&self.broker.kafka, arguments).unwrap()
    }
}

fn thrice(n: u64) -> String {
    format!("{n}\t{n}\t{n}")
}

/// Sum of a column of `--describe`, by its name in the header; `None` where any partition shows "-".
fn column_sum(text: &str, name: &str) -> Option<i64> {
    let mut lines = text.lines().filter(|l| !l.trim().is_empty());
    let at = lines.find(|l| l.starts_with("GROUP"))?.split_whitespace().position(|c| c == name)?;
    lines
        .filter(|l| l.starts_with("export."))
        .map(|l| l.split_whitespace().nth(at)?.parse::<i64>().ok())
        .sum()
}

#[test]
fn kafkas_own_tools_are_enough() {
    if !java_tools() {
        return;
    }
    let mut lab = Lab::new("orders");
    // A wrong value, a wrong name, a table that is not there: each says what to do, and nothing is changed.
    for (change, sentence) in [
        ("flumen.clickhouse.flush.rows=0", "is not a whole number from 1 to 1000000"),
        ("flumen.clickhouse.tabel=orders", "did you mean 'flumen.clickhouse.table'?"),
        ("flumen.clickhouse.columns=[id UInt65]", "column id"),
        ("flumen.clickhouse.enable=true", "create it or set flumen.clickhouse.auto.create=true"),
    ] {
        let (done, said) = lab.configs("orders", &["--add-config", change]);
        assert!(!done && said.contains(sentence), "{change}: {said}");
    }
    let (_, listed) = lab.tool(GROUPS, &["--list"]);
    assert!(!listed.contains("export.orders"), "{listed}");

    let on = "flumen.clickhouse.enable=true,flumen.clickhouse.auto.create=true,\
              flumen.clickhouse.columns=[id UInt64, price Decimal(10,2)]";
    let (done, said) = lab.configs("orders", &["--add-config", on]);
    assert!(done, "{said}");
    lab.produce("orders", 3000);
    until_settled(&lab.broker, "orders").unwrap();
    assert_eq!(lab.counts("orders"), thrice(3000));
    let (_, listed) = lab.tool(GROUPS, &["--list"]);
    assert!(listed.lines().any(|l| l.trim() == "export.orders"), "{listed}");
    let (_, described) = lab.tool(GROUPS, &["--describe", "--group", "export.orders"]);
    assert_eq!(column_sum(&described, "CURRENT-OFFSET"), Some(3000), "{described}");
    assert_eq!(column_sum(&described, "LAG"), Some(0), "{described}");
    assert!(described.contains("flumen-export-orders"), "{described}");

    // A running export is moved by nobody but itself.
    let reset =
        ["--reset-offsets", "--group", "export.orders", "--topic", "orders", "--to-earliest", "--execute"];
    let (_, said) = lab.tool(GROUPS, &reset);
    assert!(said.contains("is inactive, but the current state is Stable"), "{said}");

    let (done, said) = lab.configs("orders", &["--add-config", "flumen.clickhouse.paused=true"]);
    assert!(done, "{said}");
    until_state(&lab.broker, "orders", "paused").unwrap();
    lab.produce("orders", 700);
    until(&lab.broker, "orders", "the lag to show", |s| s["lag_records"] == 700).unwrap();
    let (_, described) = lab.tool(GROUPS, &["--describe", "--group", "export.orders"]);
    assert_eq!(column_sum(&described, "LAG"), Some(700), "{described}");
    assert_eq!(lab.counts("orders"), thrice(3000), "paused means that nothing is sent");

    let (done, said) = lab.tool(GROUPS, &reset);
    assert!(done && said.contains("NEW-OFFSET"), "{said}");
    let (_, described) = lab.tool(GROUPS, &["--describe", "--group", "export.orders"]);
    assert_eq!(column_sum(&described, "CURRENT-OFFSET"), Some(0), "{described}");
    assert_eq!(column_sum(&described, "LAG"), Some(3700), "{described}");
    let (done, said) = lab.configs("orders", &["--delete-config", "flumen.clickhouse.paused"]);
    assert!(done, "{said}");
    let status = until_settled(&lab.broker, "orders").unwrap();
    assert_eq!(status["sink_epoch"], 2);
    assert_eq!(lab.counts("orders"), thrice(3700), "a replay inserts what is not there, and nothing else");

    // Another table from here on, then off.
    let to = "flumen.clickhouse.table=orders2,flumen.clickhouse.target.lag.ms=100";
    let (done, said) = lab.configs("orders", &["--add-config", to]);
    assert!(done, "{said}");
    lab.produce("orders", 300);
    until_settled(&lab.broker, "orders").unwrap();
    assert_eq!(lab.counts("orders2"), thrice(300));
    let (done, said) = lab.configs("orders", &["--delete-config", "flumen.clickhouse.enable"]);
    assert!(done, "{said}");
    while lab.broker.get("/v1/exports").unwrap()["exports"] != json!([]) {
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    lab.produce("orders", 100);
    let (_, listed) = lab.tool(GROUPS, &["--list"]);
    assert!(!listed.contains("export.orders"), "{listed}");
    assert_eq!((lab.counts("orders"), lab.counts("orders2")), (thrice(3700), thrice(300)));

    // On again, it goes on where it was.
    let (done, said) = lab.configs("orders", &["--add-config", "flumen.clickhouse.enable=true"]);
    assert!(done, "{said}");
    until_settled(&lab.broker, "orders").unwrap();
    assert_eq!(lab.counts("orders2"), thrice(400));
}

#[test]
fn librdkafka_is_enough() {
    let mut lab = Lab::new("sales");
    let refused = |lab: &Lab, change: &str, sentence: &str| {
        let said = lab.admin(&["configs", "sales", change]);
        assert!(said.starts_with("error INVALID_CONFIG") && said.contains(sentence), "{change}: {said}");
    };
    refused(&lab, "flumen.clickhouse.delivery=twice", "exactly_once, token_only, at_least_once");
    refused(&lab, "flumen.clickhouse.enable=maybe", "true or false");
    refused(&lab, "flumen.clickhouse.endpoint=tcp://x", "http://");
    // Engines and views that would break the promise are refused when the export is turned on, with the way out.
    for table in [
        "CREATE TABLE replacing (id UInt64, _partition Int32, _offset Int64) ENGINE = ReplacingMergeTree ORDER BY id \
         SETTINGS non_replicated_deduplication_window = 100",
        "CREATE TABLE viewed (id UInt64, _partition Int32, _offset Int64) ENGINE = MergeTree ORDER BY id \
         SETTINGS non_replicated_deduplication_window = 100",
        "CREATE MATERIALIZED VIEW seen ENGINE = MergeTree ORDER BY id AS SELECT id FROM viewed",
        "CREATE TABLE forgetful (id UInt64, _partition Int32, _offset Int64) ENGINE = MergeTree ORDER BY id",
        "CREATE TABLE bare (id UInt64) ENGINE = MergeTree ORDER BY id \
         SETTINGS non_replicated_deduplication_window = 100",
    ] {
        lab.clickhouse.query(table).unwrap();
    }
    for (table, sentence) in [
        ("replacing", "merges rows away"),
        ("viewed", "a retried insert doubles its rows; run: ALTER TABLE"),
        ("forgetful", "ALTER TABLE `default`.`forgetful` MODIFY SETTING non_replicated_deduplication_window"),
        ("bare", "ADD COLUMN `_partition` Int32"),
    ] {
        let table = format!("flumen.clickhouse.table={table}");
        let said = lab.admin(&["configs", "sales", "flumen.clickhouse.enable=true", &table]);
        assert!(said.starts_with("error INVALID_CONFIG") && said.contains(sentence), "{table}: {said}");
    }
    assert_eq!(lab.admin(&["describe", "sales"]), "ok", "refusals change nothing");

    let said = lab.admin(&[
        "configs",
        "sales",
        "flumen.clickhouse.enable=true",
        "flumen.clickhouse.auto.create=true",
        "flumen.clickhouse.columns=id UInt64, price Decimal(10,2)",
        "flumen.clickhouse.target.lag.ms=100",
    ]);
    assert_eq!(said, "ok");
    lab.produce("sales", 2000);
    let status = until_settled(&lab.broker, "sales").unwrap();
    assert_eq!(status["guarantee"], "exactly_once");
    assert_eq!(lab.counts("sales"), thrice(2000));
    assert!(lab.admin(&["groups"]).lines().any(|l| l == "export.sales"));
    let offsets = |lab: &Lab| -> i64 {
        let said = lab.admin(&["offsets", "export.sales"]);
        said.lines().filter_map(|l| l.split_once(' ')?.1.parse::<i64>().ok()).sum()
    };
    assert_eq!(offsets(&lab), 2000);

    let said = lab.admin(&["reset", "export.sales", "sales", "0=0"]);
    assert!(said.starts_with("error NON_EMPTY_GROUP"), "{said}");
    let said = lab.admin(&["join", "export.sales", "sales"]);
    assert!(said.starts_with("error GROUP_AUTHORIZATION_FAILED"), "{said}");

    // The admin API pauses by the same configuration, and both show the same.
    lab.broker.call("POST", "/v1/exports/sales:pause", None).unwrap();
    assert!(lab.admin(&["describe", "sales"]).contains("flumen.clickhouse.paused=true"));
    until_state(&lab.broker, "sales", "paused").unwrap();
    for (position, error) in [("0=100000", "OFFSET_OUT_OF_RANGE"), ("17=0", "UNKNOWN_TOPIC_OR_PART")] {
        let said = lab.admin(&["reset", "export.sales", "sales", position]);
        assert!(said.starts_with(&format!("error {error}")), "{position}: {said}");
    }
    let said = lab.admin(&["reset", "export.sales", "elsewhere", "0=0"]);
    assert!(said.starts_with("error UNKNOWN_TOPIC_OR_PART"), "{said}");
    assert_eq!(offsets(&lab), 2000, "refused resets move nothing");

    // Rows go missing behind everybody's back; a replay brings back exactly these.
    lab.clickhouse.query("ALTER TABLE sales DELETE WHERE id % 7 = 0 SETTINGS mutations_sync = 1").unwrap();
    let said = lab.admin(&["reset", "export.sales", "sales", "0=0", "1=0", "2=0"]);
    assert_eq!(said, "ok");
    assert_eq!(offsets(&lab), 0);
    lab.produce("sales", 500);
    lab.broker.call("POST", "/v1/exports/sales:resume", None).unwrap();
    until_settled(&lab.broker, "sales").unwrap();
    assert_eq!(lab.counts("sales"), thrice(2500));

    // A replay survives kill -9 in its middle.
    lab.broker.call("POST", "/v1/exports/sales:pause", None).unwrap();
    until_state(&lab.broker, "sales", "paused").unwrap();
    let before =
        lab.broker.call("POST", "/v1/exports/sales:reset", Some(&json!({ "to": "earliest" }))).unwrap();
    assert_eq!((&before["lag_records"], &before["sink_epoch"]), (&json!(2500), &json!(3)));
    lab.broker.call("POST", "/v1/exports/sales:resume", None).unwrap();
    lab.broker.kill_9();
    lab.broker.restart().unwrap();
    let status = until_settled(&lab.broker, "sales").unwrap();
    assert_eq!(status["sink_epoch"], 3);
    assert_eq!(lab.counts("sales"), thrice(2500));

    // The command line, and turning it off for good: the settings go, the table stays.
    let shown = lab.broker.cli(&["export", "status", "sales"]).unwrap();
    assert!(shown.success && shown.stdout.contains("exactly_once"), "{}", shown.stdout);
    let refused = lab.broker.cli(&["export", "reset", "sales", "--to-earliest"]).unwrap();
    assert!(
        !refused.success && refused.stderr.contains("pause it, reset it, then resume it"),
        "{}",
        refused.stderr
    );
    assert!(lab.broker.cli(&["export", "delete", "sales"]).unwrap().success);
    assert_eq!(lab.admin(&["describe", "sales"]), "ok");
    assert_eq!(lab.counts("sales"), thrice(2500));
}
