//! Runs a statement on a connection: database, settings and parameters around it, INSERT data beside it.
//!
//! Invariants: INSERT data goes through the insert stream and never through the text entry point, which ends a
//! statement at an empty line in the data; a name that is no identifier never becomes SQL. Does not choose the
//! connection: a statement gets a fresh one (`engine.rs`), or that of its session.
#![forbid(unsafe_code)]

use crate::engine::Connection;
use crate::sql::{self, Shape};
use crate::statement::{Answer, EngineError, Statement, code};

/// A name that is no identifier cannot be a setting, and must not become SQL.
fn is_setting_name(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
}

/// Classes of chdb.h that change data or definitions.
const CLASS_MUTATING: std::ops::RangeInclusive<u32> = 1..=2;

impl Connection {
    fn apply(&mut self, settings: &[(String, String)]) -> Result<(), EngineError> {
        if settings.is_empty() {
            return Ok(());
        }
        let mut set = String::from("SET ");
        for (i, (name, value)) in settings.iter().enumerate() {
            if !is_setting_name(name) {
                let name: String = name.chars().take(60).collect();
                return Err(EngineError::new(
                    code::UNKNOWN_SETTING,
                    format!("Unknown setting '{name}'. (UNKNOWN_SETTING)"),
                ));
            }
            if i > 0 {
                set.push_str(", ");
            }
            set.push_str(name);
            set.push_str(" = ");
            set.push_str(&sql::quote(value));
        }
        self.query(set.as_bytes(), "Null", &[]).map(drop)
    }

    fn use_database(&mut self, database: &str) -> Result<(), EngineError> {
        self.query(format!("USE {}", sql::quote_identifier(database)).as_bytes(), "Null", &[]).map(drop)
    }

    pub(crate) fn run(&mut self, statement: &Statement) -> Result<Answer, EngineError> {
        if let Some(database) = &statement.database {
            self.use_database(database)?;
        }
        self.apply(&statement.settings)?;
        if statement.readonly {
            self.query(b"SET readonly = 2", "Null", &[])?;
        }
        self.execute(statement)
    }

    fn execute(&mut self, statement: &Statement) -> Result<Answer, EngineError> {
        let body = statement.body.as_deref().unwrap_or_default();
        let params = &statement.params;
        let mut joined = Vec::new();
        let mut text: &[u8] = &statement.sql;
        let mut shape = sql::shape(text);
        let mut rest = body;
        // ClickHouse reads `query`, a line break and the body as one text: do that where the head does not say
        // where the data starts.
        if !body.is_empty() && !matches!(shape, Shape::Insert { .. }) {
            joined.extend_from_slice(text);
            if !text.is_empty() {
                joined.push(b'\n');
            }
            joined.extend_from_slice(body);
            text = &joined;
            rest = &[];
            shape = sql::shape(text);
        }
        match shape {
            Shape::Insert { head, format, data_at } => {
                let inline = &text[data_at.min(text.len())..];
                let blank = inline.iter().all(|b| b.is_ascii_whitespace());
                // With a body, a rest of blanks behind the head is layout of the statement, not data.
                let pieces: [&[u8]; 3] = if rest.is_empty() {
                    [inline, &[], &[]]
                } else if blank {
                    [rest, &[], &[]]
                } else {
                    [inline, b"\n", rest]
                };
                self.insert(head, format, params, pieces)
            }
            Shape::InsertFromInput => Err(EngineError::new(
                code::NOT_IMPLEMENTED,
                "INSERT ... SELECT ... FROM input() with data is not supported by the embedded engine; insert into \
                 the table directly, or through a materialized view. Nothing was inserted. (NOT_IMPLEMENTED)",
            )),
            Shape::InsertOpen | Shape::Other => {
                if text.iter().all(|b| b.is_ascii_whitespace()) {
                    return Err(EngineError::new(
                        code::SYNTAX_ERROR,
                        "Syntax error: Empty query. (SYNTAX_ERROR)",
                    ));
                }
                if self.classify(text).is_some_and(|(count, _)| count > 1) {
                    return Err(EngineError::new(
                        code::SYNTAX_ERROR,
                        "Syntax error: Multi-statements are not allowed. (SYNTAX_ERROR)",
                    ));
                }
                self.query(&sql::with_client_query_ids(text), &statement.format, params)
            }
        }
    }
}

/// A connection that outlives one statement.
pub struct Session {
    pub(crate) connection: Connection,
}

impl Session {
    /// Runs one statement. What comes with the statement (database, settings, readonly) is undone after it; what the
    /// statement itself changes (`SET`, `USE`, temporary tables) stays.
    pub fn run(&mut self, statement: &Statement) -> Result<Answer, EngineError> {
        let connection = &mut self.connection;
        let before = match &statement.database {
            Some(_) => Some(connection.text("SELECT currentDatabase()")?),
            None => None,
        };
        let mut undo = Vec::new();
        for (name, _) in statement.settings.iter().filter(|(name, _)| is_setting_name(name)) {
            let sql = format!(
                "SELECT if(changed, value, '') , changed FROM system.settings WHERE name = {}",
                sql::quote(name)
            );
            let row = connection.text(&sql)?;
            let changed =
                row.rsplit_once('\t').filter(|(_, changed)| *changed == "1").map(|(value, _)| value);
            undo.push(match changed {
                Some(value) => format!("{name} = {}", sql::quote(value)),
                None => format!("{name} = DEFAULT"),
            });
        }
        // readonly cannot be taken back by SET, so in a session a GET that would write is refused here.
        let writes = !matches!(sql::shape(&statement.sql), Shape::Other)
            || connection.classify(&statement.sql).is_some_and(|(_, class)| CLASS_MUTATING.contains(&class));
        if statement.readonly && writes {
            return Err(EngineError::new(
                164,
                "Cannot execute query in readonly mode: use POST to write. (READONLY)",
            ));
        }
        let outcome = connection.run(&Statement { readonly: false, ..statement.clone() });
        for set in undo {
            // A name that is no setting was refused above, and then there is nothing to undo.
            let _ = connection.query(format!("SET {set}").as_bytes(), "Null", &[]);
        }
        if let Some(database) = before {
            connection.use_database(&database)?;
        }
        outcome
    }
}
