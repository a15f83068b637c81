//! The HTTP server in front of the engine.
//!
//! Owns the listener, the blocking threads that statements run on, the query ids that run now and the sessions. One
//! single-threaded runtime serves sockets, so a long statement never delays `/ping`. Invariants: a statement starts
//! only when its whole request has arrived and decoded (a cut body inserts nothing); a statement that has started runs
//! to its end even if the client leaves, as in ClickHouse; the number of running and of waiting statements is bounded.
//! Does not stream results: an answer is complete before its first byte is sent, so an error always has its status.
#![forbid(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet};
use std::future::IntoFuture;
use std::io::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use axum::response::Response;
use bytes::Bytes;

use crate::engine::{Door, Engine, MAX_RUNNING};
use crate::run::Session;
use crate::statement::{Answer, EngineError, Statement, code};
use crate::{blocks, encoding, http, sql};

/// Statements that may wait for a thread; beyond it clients get ClickHouse's error 202 and try again.
const MAX_WAITING: usize = 1024;
/// Threads that unpack compressed bodies beside the one that serves sockets.
const UNPACKING_THREADS: usize = 4;
/// Largest request body, plain or packed: held in memory whole, since a cut body must not insert.
const MAX_BODY_BYTES: usize = 1 << 30;
/// Sessions kept; every one holds a connection. The one unused for longest makes room.
const MAX_SESSIONS: usize = 256;
/// Life of an unused session where the client asks for none: ClickHouse's default.
const SESSION_TIMEOUT: Duration = Duration::from_secs(60);
/// Longest life of an unused session: ClickHouse's default maximum.
const MAX_SESSION_TIMEOUT: Duration = Duration::from_secs(3600);
/// How long a stop waits for running statements. Leaving them is safe, as a kill is.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);
/// How often a stop looks whether statements still run whose clients have left.
const STOP_POLL: Duration = Duration::from_millis(10);

/// How `flumen clickhouse` runs.
#[derive(Debug, Clone)]
pub struct ServeOptions {
    pub data_dir: PathBuf,
    pub listen: SocketAddr,
    /// libchdb.so; searched for where none is given.
    pub lib: Option<PathBuf>,
}

#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    #[error(transparent)]
    Library(#[from] LibraryError),
    #[error(
        "cannot listen on {listen}: {error}. Is another server running there? Choose another address with --listen"
    )]
    Listen { listen: SocketAddr, error: std::io::Error },
    #[error("{}", .0.message)]
    Engine(EngineError),
    #[error("the server failed: {0}")]
    Io(#[from] std::io::Error),
}

#[derive(Debug, thiserror::Error)]
pub enum LibraryError {
    #[error("the ClickHouse engine {} does not exist; sink/embedded/fetch-engine.sh fetches it", .0.display())]
    Missing(PathBuf),
    #[error(
        "the ClickHouse engine libchdb.so was not found (looked at {looked}): run sink/embedded/fetch-engine.sh, which \
         fetches it with npm or pip, or give its path in FLUMEN_CHDB_LIB"
    )]
    NotFound { looked: String },
}

/// Finds libchdb.so: the path given, `FLUMEN_CHDB_LIB`, beside the executable, `./.cache/chdb`, `~/.cache/flumen`.
pub fn find_library(explicit: Option<&Path>) -> Result<PathBuf, LibraryError> {
    let named = explicit
        .map(Path::to_path_buf)
        .or_else(|| std::env::var_os("FLUMEN_CHDB_LIB").filter(|v| !v.is_empty()).map(PathBuf::from));
    if let Some(path) = named {
        return if path.is_file() { Ok(path) } else { Err(LibraryError::Missing(path)) };
    }
    let mut candidates = Vec::new();
    if let Some(dir) = std::env::current_exe().ok().as_deref().and_then(Path::parent) {
        candidates.push(dir.join("libchdb.so"));
    }
    candidates.push(PathBuf::from(".cache/chdb/libchdb.so"));
    if let Some(home) = std::env::var_os("HOME") {
        candidates.push(PathBuf::from(home).join(".cache/flumen/libchdb.so"));
    }
    match candidates.iter().find(|c| c.is_file()) {
        Some(found) => Ok(found.clone()),
        None => {
            let looked = candidates.iter().map(|c| c.display().to_string()).collect::<Vec<_>>().join(", ");
            Err(LibraryError::NotFound { looked })
        }
    }
}

/// Serves until SIGTERM or SIGINT. Blocks; builds its own runtime. Where statements outlast the time for stopping, the
/// process ends here with status 0.
pub fn serve(options: ServeOptions) -> Result<(), ServeError> {
    let started = Instant::now();
    let lib = find_library(options.lib.as_deref())?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(UNPACKING_THREADS)
        .build()?;
    let listen = options.listen;
    let listener = runtime
        .block_on(tokio::net::TcpListener::bind(listen))
        .map_err(|error| ServeError::Listen { listen, error })?;
    let address = listener.local_addr()?;
    let engine = Engine::open(&lib, &options.data_dir).map_err(ServeError::Engine)?;
    let server = Arc::new(Server {
        engine,
        board: Arc::new(Board {
            waiting: AtomicUsize::new(0),
            running: Mutex::new(BTreeSet::new()),
            sessions: Mutex::new(BTreeMap::new()),
        }),
    });
    let board = server.board.clone();
    let result = runtime.block_on(async {
        let stop = stop_signal()?;
        let (stopping, mut stopped) = tokio::sync::watch::channel(false);
        let app = Router::new().fallback(handle).with_state(server.clone());
        let serving = axum::serve(listener, app)
            .with_graceful_shutdown(async move {
                stop.await;
                let _ = stopping.send(true);
            })
            .into_future();
        let mut out = std::io::stdout();
        let _ = writeln!(
            out,
            "flumen clickhouse ready http={address} data={} took={}ms",
            options.data_dir.display(),
            started.elapsed().as_millis()
        );
        let _ = out.flush();
        let late = async {
            let _ = stopped.wait_for(|stop| *stop).await;
            tokio::time::sleep(STOP_TIMEOUT).await;
        };
        let drained = async {
            let served = serving.await;
            // Statements outlive the connections of their clients.
            while board.waiting.load(Ordering::Relaxed) > 0 {
                tokio::time::sleep(STOP_POLL).await;
            }
            served.map_err(ServeError::Io)
        };
        tokio::select! {
            served = drained => served,
            () = late => Ok(()),
        }
    });
    if board.waiting.load(Ordering::Relaxed) > 0 {
        // The engine aborts if the process is torn down under a running INSERT; ending at once is safe, as a kill is.
        tracing::warn!("statements still run after {STOP_TIMEOUT:?}; leaving them");
        crate::engine::leave_process();
    }
    // Tasks hold the server; without them this is the last reference, so the engine closes here, after the sessions.
    drop(runtime);
    lock(&board.sessions).clear();
    drop(server);
    result
}

/// Installs the handlers at once; completes at the first signal.
fn stop_signal() -> Result<impl Future<Output = ()>, std::io::Error> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut term = signal(SignalKind::terminate())?;
    let mut int = signal(SignalKind::interrupt())?;
    Ok(async move {
        tokio::select! {
            _ = term.recv() => {}
            _ = int.recv() => {}
        }
    })
}

/// What the handlers share.
struct Server {
    engine: Engine,
    board: Arc<Board>,
}

/// What statements share; they outlive the handler that started them, and must not keep the engine, whose threads they
/// run on. Every lock is held for a few instructions only.
struct Board {
    waiting: AtomicUsize,
    running: Mutex<BTreeSet<String>>,
    sessions: Mutex<BTreeMap<String, Slot>>,
}

struct Slot {
    /// `None` while a statement uses it.
    session: Option<Session>,
    used: Instant,
    timeout: Duration,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What the mutexes guard is consistent after every single operation, so a panic elsewhere does not spoil it.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Counts a statement from its acceptance to its end and holds its query id.
struct Running {
    board: Arc<Board>,
    query_id: String,
}

impl Running {
    fn enter(board: &Arc<Board>, query_id: &str) -> Result<Running, EngineError> {
        if board.waiting.fetch_add(1, Ordering::Relaxed) >= MAX_RUNNING + MAX_WAITING {
            board.waiting.fetch_sub(1, Ordering::Relaxed);
            return Err(EngineError::new(
                code::TOO_MANY_QUERIES,
                "Too many simultaneous queries for the embedded engine. (TOO_MANY_SIMULTANEOUS_QUERIES)",
            ));
        }
        if !lock(&board.running).insert(query_id.to_owned()) {
            board.waiting.fetch_sub(1, Ordering::Relaxed);
            return Err(EngineError::new(
                code::SAME_QUERY_ID,
                format!(
                    "Query with id = {query_id} is already running. (QUERY_WITH_SAME_ID_IS_ALREADY_RUNNING)"
                ),
            ));
        }
        Ok(Running { board: board.clone(), query_id: query_id.to_owned() })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.board.waiting.fetch_sub(1, Ordering::Relaxed);
        lock(&self.board.running).remove(&self.query_id);
    }
}

/// Takes a session out for one statement and puts it back.
struct Lease {
    board: Arc<Board>,
    id: String,
    session: Option<Session>,
    close: bool,
}

impl Lease {
    fn take(door: &Door, board: &Arc<Board>, ask: &http::Ask, id: &str) -> Result<Lease, EngineError> {
        let now = Instant::now();
        let timeout =
            ask.session_timeout_s.map_or(SESSION_TIMEOUT, Duration::from_secs).min(MAX_SESSION_TIMEOUT);
        let mut sessions = lock(&board.sessions);
        // Sessions are closed after the lock is released: closing calls into the engine.
        let mut dropped = Vec::new();
        let expired = |slot: &Slot| slot.session.is_some() && now.duration_since(slot.used) > slot.timeout;
        let old: Vec<String> =
            sessions.iter().filter(|(_, s)| expired(s)).map(|(id, _)| id.clone()).collect();
        dropped.extend(old.iter().filter_map(|id| sessions.remove(id)));
        let session = match sessions.get_mut(id) {
            Some(slot) => match slot.session.take() {
                Some(session) => {
                    slot.timeout = timeout;
                    Some(session)
                }
                None => {
                    return Err(EngineError::new(
                        code::SESSION_IS_LOCKED,
                        format!("Session {id} is locked by a concurrent client. (SESSION_IS_LOCKED)"),
                    ));
                }
            },
            None if ask.session_check => {
                return Err(EngineError::new(
                    code::SESSION_NOT_FOUND,
                    format!("Session {id} not found. (SESSION_NOT_FOUND)"),
                ));
            }
            None => {
                if sessions.len() >= MAX_SESSIONS {
                    let idle = sessions.iter().filter(|(_, s)| s.session.is_some());
                    let oldest = idle.min_by_key(|(_, s)| s.used).map(|(id, _)| id.clone());
                    dropped.extend(oldest.and_then(|id| sessions.remove(&id)));
                }
                sessions.insert(id.to_owned(), Slot { session: None, used: now, timeout });
                None
            }
        };
        drop(sessions);
        drop(dropped);
        let mut lease = Lease { board: board.clone(), id: id.to_owned(), session, close: ask.close_session };
        if lease.session.is_none() {
            lease.session = Some(door.session()?);
        }
        Ok(lease)
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut sessions = lock(&self.board.sessions);
        match (self.session.take(), self.close) {
            (Some(session), false) => {
                if let Some(slot) = sessions.get_mut(&self.id) {
                    slot.session = Some(session);
                    slot.used = Instant::now();
                }
            }
            (session, _) => {
                let slot = sessions.remove(&self.id);
                drop(sessions);
                drop((session, slot));
            }
        }
    }
}

async fn handle(State(server): State<Arc<Server>>, request: Request) -> Response {
    let query_id = uuid::Uuid::new_v4().to_string();
    let path = request.uri().path().to_owned();
    let method = request.method().clone();
    let mut response = match path.as_str() {
        "/ping" | "/replicas_status" if matches!(method, Method::GET | Method::HEAD) => {
            let mut response = Response::new(Body::from(if path == "/ping" { "Ok.\n" } else { "Ok." }));
            plain(response.headers_mut());
            response
        }
        "/" => match method {
            Method::GET | Method::HEAD | Method::POST => query(&server, request, query_id).await,
            _ => {
                let mut response = Response::new(Body::from("only GET, HEAD and POST are served\n"));
                *response.status_mut() = StatusCode::METHOD_NOT_ALLOWED;
                response.headers_mut().insert(header::ALLOW, HeaderValue::from_static("GET, HEAD, POST"));
                response
            }
        },
        _ => {
            let mut response = Response::new(Body::from(format!(
                "There is no handle {path}\nUse / or /ping for health checks.\nThis is the embedded ClickHouse of Flumen.\n"
            )));
            *response.status_mut() = StatusCode::NOT_FOUND;
            plain(response.headers_mut());
            response
        }
    };
    set(response.headers_mut(), "x-clickhouse-server-display-name", &server.engine.about().host);
    response
}

fn plain(headers: &mut HeaderMap) {
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=UTF-8"));
}

/// Sets a header; a value that HTTP cannot carry is left out.
fn set(headers: &mut HeaderMap, name: &'static str, value: &str) {
    if let Ok(value) = HeaderValue::from_str(value) {
        headers.insert(HeaderName::from_static(name), value);
    }
}

async fn query(server: &Arc<Server>, request: Request, own_id: String) -> Response {
    let (parts, body) = request.into_parts();
    let text = |name: &str| parts.headers.get(name).and_then(|v| v.to_str().ok());
    let headers = http::Headers {
        authorization: text("authorization"),
        user: text("x-clickhouse-user"),
        key: text("x-clickhouse-key"),
        database: text("x-clickhouse-database"),
        format: text("x-clickhouse-format"),
    };
    let ask = http::parse(parts.uri.query().unwrap_or(""), headers);
    let query_id = ask.as_ref().ok().and_then(|a| a.query_id.clone()).unwrap_or(own_id);
    let outcome = match ask {
        Ok(ask) => answer(server, &parts, body, ask, &query_id).await,
        Err(e) => Err(e),
    };
    let mut response = outcome.unwrap_or_else(|e| failure(&e));
    set(response.headers_mut(), "x-clickhouse-query-id", &query_id);
    set(response.headers_mut(), "x-clickhouse-timezone", &server.engine.about().timezone);
    response
}

fn failure(error: &EngineError) -> Response {
    let mut response = Response::new(Body::from(format!("{error}\n")));
    *response.status_mut() =
        StatusCode::from_u16(http::status(error.code)).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    plain(response.headers_mut());
    set(response.headers_mut(), "x-clickhouse-exception-code", &error.code.to_string());
    response
}

async fn answer(
    server: &Arc<Server>,
    parts: &axum::http::request::Parts,
    body: Body,
    ask: http::Ask,
    query_id: &str,
) -> Result<Response, EngineError> {
    http::authenticate(&ask)?;
    let post = parts.method == Method::POST;
    if parts.headers.contains_key(header::CONTENT_TYPE)
        && text_of(&parts.headers, header::CONTENT_TYPE).starts_with("multipart/")
    {
        return Err(EngineError::new(
            code::NOT_IMPLEMENTED,
            "multipart/form-data (external tables) is not supported by the embedded engine. (NOT_IMPLEMENTED)",
        ));
    }
    let body = read_body(&parts.headers, body, ask.decompress).await?;
    if ask.query.is_empty() && body.is_empty() && !post {
        // A browser or a health check that asks for `/`.
        let mut response = Response::new(Body::from("Ok.\n"));
        plain(response.headers_mut());
        return Ok(response);
    }
    let format = ask.format.clone().unwrap_or_else(|| "TabSeparated".to_owned());
    let mut statement = Statement {
        database: ask.database.clone(),
        settings: ask.settings.clone(),
        params: ask.params.clone(),
        readonly: !post,
        format: format.clone(),
        ..Statement::default()
    };
    if ask.query.is_empty() {
        // SQL, a line break and data in one body.
        split_body(&mut statement, body);
    } else {
        statement.sql = ask.query.clone();
        statement.body = Some(body);
    }
    // The engine has no way to give a query its id, so the id travels in the comment (`sql::with_client_query_ids`).
    if ask.query_id.is_some() && !statement.settings.iter().any(|(name, _)| name == "log_comment") {
        statement.settings.push(("log_comment".to_owned(), format!("query_id={query_id}")));
    }
    let format = sql::output_format(&statement.sql).map_or(format, str::to_owned);
    let running = Running::enter(&server.board, query_id)?;
    let started = Instant::now();
    let compress = ask.compress;
    let board = server.board.clone();
    let (reply, outcome) = tokio::sync::oneshot::channel();
    server.engine.submit(move |door| {
        // Lives as long as the statement, not as long as the connection of the client.
        let running = running;
        let outcome = execute(door, &board, &ask, &statement).map(|answer| {
            let wire = if compress { blocks::encode(&answer.data) } else { Vec::new() };
            (answer, wire)
        });
        drop(running);
        // A client that left does not hear of it; the statement has run all the same.
        let _ = reply.send(outcome);
    });
    let (mut answer, wire) = outcome.await.map_err(|_| {
        EngineError::new(code::ABORTED, "the statement did not end: its thread failed. (ABORTED)")
    })??;
    let summary = summary(&answer, started.elapsed());
    let data = if compress { wire } else { std::mem::take(&mut answer.data) };
    let mut response = Response::new(Body::from(data));
    let headers = response.headers_mut();
    set(headers, "content-type", http::content_type(&format));
    set(headers, "x-clickhouse-format", &format);
    set(headers, "x-clickhouse-summary", &summary);
    Ok(response)
}

/// Runs on a thread of the engine.
fn execute(
    door: &Door,
    board: &Arc<Board>,
    ask: &http::Ask,
    statement: &Statement,
) -> Result<Answer, EngineError> {
    let Some(id) = &ask.session_id else {
        return door.run(statement);
    };
    let mut lease = Lease::take(door, board, ask, id)?;
    match &mut lease.session {
        Some(session) => session.run(statement),
        None => Err(EngineError::new(code::ABORTED, "the session is closed. (ABORTED)")),
    }
}

fn text_of(headers: &HeaderMap, name: HeaderName) -> String {
    headers.get(name).and_then(|v| v.to_str().ok()).unwrap_or("").to_ascii_lowercase()
}

/// Takes the head of an INSERT apart from its data without copying the data.
fn split_body(statement: &mut Statement, body: Bytes) {
    match sql::shape(&body) {
        sql::Shape::Insert { data_at, .. } if data_at < body.len() => {
            statement.sql = body[..data_at].to_vec();
            statement.body = Some(body.slice(data_at..));
        }
        _ => statement.sql = body.to_vec(),
    }
}

async fn read_body(headers: &HeaderMap, body: Body, decompress: bool) -> Result<Bytes, EngineError> {
    let body = axum::body::to_bytes(body, MAX_BODY_BYTES).await.map_err(|e| {
        // A body shorter than its length, a broken chunk, or one too large: nothing has been looked at yet.
        let large = std::error::Error::source(&e).is_some_and(|s| s.to_string().contains("length limit"));
        if large {
            return EngineError::new(
                code::LIMIT_EXCEEDED,
                format!("the body has more than {MAX_BODY_BYTES} bytes; send it in pieces. (LIMIT_EXCEEDED)"),
            );
        }
        EngineError::new(
            code::INCORRECT_DATA,
            format!("the request body did not arrive whole: {e}. Nothing was executed. (INCORRECT_DATA)"),
        )
    })?;
    let named = text_of(headers, header::CONTENT_ENCODING);
    // Unpacking is work of the processor: not on the thread that serves sockets.
    if (named.is_empty() || named == "identity") && !decompress {
        return Ok(body);
    }
    let unpack = move || -> Result<Bytes, EngineError> {
        let plain = encoding::decode(&named, &body, MAX_BODY_BYTES).map_err(|e| {
            let code = match e {
                encoding::EncodingError::Unknown(_) => code::UNKNOWN_COMPRESSION_METHOD,
                encoding::EncodingError::Damaged { .. } => code::CANNOT_DECOMPRESS,
                encoding::EncodingError::TooLarge { .. } => code::LIMIT_EXCEEDED,
            };
            EngineError::new(code, e.to_string())
        })?;
        let body = plain.map_or(body, Bytes::from);
        if !decompress {
            return Ok(body);
        }
        blocks::decode(&body, MAX_BODY_BYTES).map(Bytes::from).map_err(|e| {
            EngineError::new(
                code::CANNOT_DECOMPRESS,
                format!("{e}. Nothing was executed. (CANNOT_DECOMPRESS)"),
            )
        })
    };
    tokio::task::spawn_blocking(unpack)
        .await
        .map_err(|e| EngineError::new(code::LOGICAL_ERROR, format!("the body was not unpacked: {e}")))?
}

fn summary(answer: &Answer, elapsed: Duration) -> String {
    // An INSERT reports the rows it wrote as read as well, as in ClickHouse.
    let read = |read: u64, written: u64| read.max(written).to_string();
    serde_json::json!({
        "read_rows": read(answer.rows_read, answer.rows_written),
        "read_bytes": read(answer.bytes_read, answer.bytes_written),
        "written_rows": answer.rows_written.to_string(),
        "written_bytes": answer.bytes_written.to_string(),
        "total_rows_to_read": "0",
        "result_rows": read(answer.rows_read, answer.rows_written),
        "result_bytes": read(answer.data.len() as u64, answer.bytes_written),
        "elapsed_ns": elapsed.as_nanos().to_string(),
    })
    .to_string()
}
