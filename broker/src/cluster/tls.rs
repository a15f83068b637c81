//! Certificates of the port for brokers: read from three files, checked, put into force, and read again when they change.
//!
//! One authority signs the certificates of all brokers of a cluster. Whoever shows one is a broker; the side that connects
//! also wants it to be for the address that it connected to. TLS 1.3 and nothing older.
//!
//! Invariants
//! - Nothing is in force that this broker would refuse if another showed it.
//! - No session is resumed: every connection shows its certificates, and those in force judge them.
//! - A connection that is established stays so when its certificates are replaced or expire.
//! - Nothing of a key is in a message of this file or in what `Debug` prints.
//!
//! Bounds: a file of `PEM_BYTES_MAX`; a handshake of `HANDSHAKE_TIME_MAX`, in which rustls keeps at most one message of
//! 64 KiB and one record; how many there are at a time, `listener` bounds. It knows no lists of revoked certificates.

use std::fs;
use std::io::Read;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use arc_swap::ArcSwap;
use rustls::client::danger::ServerCertVerifier;
use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{CertificateError, ClientConfig, Error, RootCertStore, ServerConfig, version};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::{TlsAcceptor, TlsConnector, TlsStream};

use super::stream::Socket;
use super::tls_words::{self, cause};
use super::wire::LinkError;

/// A chain of a few certificates takes some KiB; bundles of all public authorities 300.
const PEM_BYTES_MAX: u64 = 1 << 20;
/// A broker that connects gives up after 2 s (`links`); nothing that takes longer is one.
pub const HANDSHAKE_TIME_MAX: Duration = Duration::from_secs(3);
/// For the other side to read why it was refused: a socket that is closed at once would tell it of a reset instead.
const LINGER_TIME_MAX: Duration = Duration::from_secs(1);
/// More than a broker says before it hears the answer to its hello.
const LINGER_BYTES_MAX: usize = 64 << 10;
/// Three looks at files; new certificates are there for days before the old ones end.
const LOOK_INTERVAL: Duration = Duration::from_secs(2);
/// Before this time is left, nobody need do anything; within it somebody has to.
const EXPIRY_NOTICE: Duration = Duration::from_secs(14 * 24 * 3600);

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// The chain of this broker, its own certificate first.
    pub cert: PathBuf,
    pub key: PathBuf,
    /// Who may sign the certificates of brokers.
    pub ca: PathBuf,
}

/// What is made of the files.
struct Material {
    connector: TlsConnector,
    acceptor: TlsAcceptor,
    chain: Vec<CertificateDer<'static>>,
    as_client: Arc<dyn ClientCertVerifier>,
    as_server: Arc<WebPkiServerVerifier>,
}

/// Files and what is in force of them.
pub struct RpcTls {
    files: TlsFiles,
    in_force: ArcSwap<Material>,
    /// As the files were before they were read.
    stamp: Stamp,
    /// Where others reach this broker, once that is known.
    own_host: OnceLock<String>,
    /// Why the files could not be read again.
    failure: Mutex<Option<String>>,
    told_of_key: AtomicBool,
}

impl std::fmt::Debug for RpcTls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RpcTls").field("files", &self.files).finish_non_exhaustive()
    }
}

/// What an operator should know of the certificates.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Trouble {
    Expired,
    ExpiresSoon,
    /// The files changed and could not be taken.
    NotReadAgain(String),
}

impl RpcTls {
    /// Reads the files; what they hold has to be good now.
    pub fn load(files: TlsFiles) -> Result<RpcTls, String> {
        let stamp = Stamp::of(&files);
        let material = Material::read(&files)?;
        material.check(&files, None, UnixTime::now())?;
        Ok(RpcTls::of(files, stamp, material))
    }

    fn of(files: TlsFiles, stamp: Stamp, material: Material) -> RpcTls {
        let tls = RpcTls {
            files,
            in_force: ArcSwap::from_pointee(material),
            stamp,
            own_host: OnceLock::new(),
            failure: Mutex::default(),
            told_of_key: AtomicBool::new(false),
        };
        tls.look_at_key();
        tls
    }

    pub fn files(&self) -> &TlsFiles {
        &self.files
    }

    /// Others reach this broker at `address`: its certificate has to be for that.
    pub fn serve_at(&self, address: &str) -> Result<(), String> {
        let host = self.own_host.get_or_init(|| host_of(address).to_string());
        self.in_force.load().check(&self.files, Some(host), UnixTime::now())
    }

    /// As the side that connected to `address`, HOST:PORT.
    pub async fn connect(&self, stream: TcpStream, address: &str) -> Result<TlsStream<Socket>, LinkError> {
        let host = host_of(address);
        let name = ServerName::try_from(host.to_string()).map_err(|_| {
            LinkError::Tls(format!(
                "'{host}' is neither an IP address nor a name that a certificate can have"
            ))
        })?;
        let peer = format!("the broker at {address}");
        let connector = self.in_force.load().connector.clone();
        match connector.connect(name, Socket::new(stream)).await {
            Ok(stream) => Ok(stream.into()),
            Err(error) => Err(LinkError::Tls(tls_words::of_handshake(&error, &peer, &self.files))),
        }
    }

    /// As the side that is connected to; `peer` says who does.
    pub async fn accept(&self, stream: TcpStream, peer: &str) -> Result<TlsStream<Socket>, LinkError> {
        let acceptor = self.in_force.load().acceptor.clone();
        let accepted = timeout(HANDSHAKE_TIME_MAX, acceptor.accept(Socket::new(stream)).into_fallible());
        match accepted.await {
            Ok(Ok(stream)) => Ok(stream.into()),
            Ok(Err((error, socket))) => {
                let _ = timeout(LINGER_TIME_MAX, linger(socket)).await;
                // One that only looked whether the port is there is none that was refused.
                match cause(&error) {
                    Some(cause) => Err(LinkError::Tls(tls_words::of_peer(cause, peer, &self.files))),
                    None => Err(error.into()),
                }
            }
            Err(_) => Err(LinkError::Silent),
        }
    }

    /// What a connection that TLS ended says of it.
    pub fn explain(&self, error: LinkError, peer: &str) -> LinkError {
        match &error {
            LinkError::Io(io) => match cause(io) {
                Some(cause) => LinkError::Tls(tls_words::of_peer(cause, peer, &self.files)),
                None => error,
            },
            _ => error,
        }
    }

    pub fn trouble(&self) -> Option<Trouble> {
        if let Some(failure) = &*self.failure.lock().expect("no panic under this lock") {
            return Some(Trouble::NotReadAgain(failure.clone()));
        }
        self.in_force.load().trouble(UnixTime::now())
    }

    /// Reads the files again; the old ones stay in force when the new ones cannot be.
    fn read_again(&self) {
        let read = Material::read(&self.files).and_then(|material| {
            material.check(&self.files, self.own_host.get().map(String::as_str), UnixTime::now())?;
            Ok(material)
        });
        let failure = match read {
            Ok(material) => {
                self.in_force.store(Arc::new(material));
                tracing::info!(cert = %self.files.cert.display(), "certificates for other brokers read again; new connections use them");
                self.look_at_key();
                None
            }
            Err(failure) => {
                tracing::warn!(%failure, "the certificates for other brokers changed and cannot be used; the old ones stay in force");
                Some(failure)
            }
        };
        *self.failure.lock().expect("no panic under this lock") = failure;
    }

    fn look_at_key(&self) {
        let open = fs::metadata(&self.files.key).is_ok_and(|found| found.permissions().mode() & 0o004 != 0);
        if open && !self.told_of_key.swap(true, Ordering::Relaxed) {
            let key = self.files.key.display();
            tracing::warn!(
                "every user of this machine can read {key}, and act as a broker with it; chmod 600 {key}"
            );
        }
    }
}

/// Looks at the files for as long as the process runs.
pub async fn watch(tls: Arc<RpcTls>) {
    let mut rotation = Rotation { read: tls.stamp.clone(), seen: tls.stamp.clone() };
    loop {
        tokio::time::sleep(LOOK_INTERVAL).await;
        if rotation.look(Stamp::of(&tls.files)) {
            tls.read_again();
        }
    }
}

/// What tells a file from one that was put in its place, or written to.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Stamp([Option<(u64, i64, i64, u64)>; 3]);

impl Stamp {
    fn of(files: &TlsFiles) -> Stamp {
        Stamp([&files.cert, &files.key, &files.ca].map(|path| {
            let found = fs::metadata(path).ok()?;
            Some((found.ino(), found.ctime(), found.ctime_nsec(), found.size()))
        }))
    }
}

/// When to read again: not while somebody still writes, which is when two looks differ.
struct Rotation {
    read: Stamp,
    seen: Stamp,
}

impl Rotation {
    fn look(&mut self, now: Stamp) -> bool {
        let settled = self.seen == now;
        self.seen = now;
        if settled && self.read != self.seen {
            self.read = self.seen.clone();
            return true;
        }
        false
    }
}

impl Material {
    fn read(files: &TlsFiles) -> Result<Material, String> {
        let chain = certificates(&files.cert)?;
        let key_name = files.key.display();
        let key = PrivateKeyDer::from_pem_slice(&read(&files.key)?).map_err(|_| {
            format!("{key_name} holds no private key that can be read; it has to be PEM, and not encrypted")
        })?;
        let mut roots = RootCertStore::empty();
        for root in certificates(&files.ca)? {
            roots.add(root).map_err(|error| {
                format!("{} holds what is no authority's certificate ({error})", files.ca.display())
            })?;
        }
        let roots = Arc::new(roots);
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let unusable = |error: Error| match error {
            Error::InconsistentKeys(_) => {
                format!(
                    "{key_name} is not the key of {}; give the two that were made together",
                    files.cert.display()
                )
            }
            other => format!("{} with {key_name} cannot be used: {other}", files.cert.display()),
        };
        let no_verifier = |error| format!("{} cannot be used: {error}", files.ca.display());
        let as_server = WebPkiServerVerifier::builder_with_provider(roots.clone(), provider.clone())
            .build()
            .map_err(no_verifier)?;
        let as_client = WebPkiClientVerifier::builder_with_provider(roots, provider.clone())
            .build()
            .map_err(no_verifier)?;
        let mut client = ClientConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&version::TLS13])
            .map_err(unusable)?
            .with_webpki_verifier(as_server.clone())
            .with_client_auth_cert(chain.clone(), key.clone_key())
            .map_err(unusable)?;
        client.resumption = Resumption::disabled();
        let mut server = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&version::TLS13])
            .map_err(unusable)?
            .with_client_cert_verifier(as_client.clone())
            .with_single_cert(chain.clone(), key)
            .map_err(unusable)?;
        server.send_tls13_tickets = 0;
        server.session_storage = Arc::new(NoServerSessionStorage {});
        Ok(Material {
            connector: TlsConnector::from(Arc::new(client)),
            acceptor: TlsAcceptor::from(Arc::new(server)),
            chain,
            as_client,
            as_server,
        })
    }

    /// Whether the others will take this broker's own certificate, if their authority is the same.
    fn check(&self, files: &TlsFiles, host: Option<&str>, now: UnixTime) -> Result<(), String> {
        let words = |error| match error {
            Error::InvalidCertificate(error) => {
                tls_words::of_certificate(&error, &format!("the certificate {}", files.cert.display()), files)
            }
            other => format!("{} cannot be used: {other}", files.cert.display()),
        };
        self.verify(now).map_err(words)?;
        let Some(host) = host else { return Ok(()) };
        let name = ServerName::try_from(host.to_string()).map_err(|_| {
            format!("'{host}' is neither an IP address nor a name that a certificate can have")
        })?;
        let (own, more) = self.chain.split_first().ok_or("there is no certificate")?;
        self.as_server.verify_server_cert(own, more, &name, &[], now).map_err(words).map(drop)
    }

    fn verify(&self, now: UnixTime) -> Result<(), Error> {
        let (own, more) = self.chain.split_first().ok_or(Error::NoCertificatesPresented)?;
        self.as_client.verify_client_cert(own, more, now).map(drop)
    }

    fn trouble(&self, now: UnixTime) -> Option<Trouble> {
        let expired = |at| {
            let expired = |error: &CertificateError| {
                matches!(error, CertificateError::Expired | CertificateError::ExpiredContext { .. })
            };
            matches!(self.verify(at), Err(Error::InvalidCertificate(error)) if expired(&error))
        };
        let later = UnixTime::since_unix_epoch(Duration::from_secs(now.as_secs()) + EXPIRY_NOTICE);
        match () {
            () if expired(now) => Some(Trouble::Expired),
            () if expired(later) => Some(Trouble::ExpiresSoon),
            () => None,
        }
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let bytes = read(path)?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&bytes).collect();
    match found {
        Ok(found) if !found.is_empty() => Ok(found),
        _ => Err(format!("{} holds no certificate that can be read; it has to be PEM", path.display())),
    }
}

fn read(path: &Path) -> Result<Vec<u8>, String> {
    let read = || {
        let mut bytes = Vec::new();
        fs::File::open(path)?.take(PEM_BYTES_MAX).read_to_end(&mut bytes)?;
        std::io::Result::Ok(bytes)
    };
    read().map_err(|error| format!("cannot read {}: {error}", path.display()))
}

/// Waits until the other side has gone, or for as long as the caller does. What it says is not kept.
async fn linger(mut socket: Socket) {
    let _ = socket.shutdown().await;
    let (mut ignored, mut bytes) = ([0; 4096], 0);
    while bytes < LINGER_BYTES_MAX
        && let Ok(read @ 1..) = socket.read(&mut ignored).await
    {
        bytes += read;
    }
}

/// The host of HOST:PORT; of [IPv6]:PORT without the brackets.
pub fn host_of(address: &str) -> &str {
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
    host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host)
}

#[cfg(test)]
#[path = "tls_tests.rs"]
mod tests;
