//! Both sides of a connection in one process, with certificates made here: what comes about, and what each side says of what
//! does not.

use std::collections::VecDeque;
use std::path::Path;

use bytes::{Bytes, BytesMut};
use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    PKCS_ECDSA_P256_SHA256,
};
use tokio::net::TcpListener;

use super::super::stream::Stream;
use super::*;

struct Authority(Issuer<'static, KeyPair>, String);

impl Authority {
    fn new() -> Authority {
        let key = key();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let pem = params.self_signed(&key).unwrap().pem();
        Authority(Issuer::new(params, key), pem)
    }

    /// Files of a broker at `host`, in a directory of its own.
    fn files(&self, dir: &Path, host: &str, change: impl FnOnce(&mut CertificateParams)) -> TlsFiles {
        std::fs::create_dir_all(dir).unwrap();
        let key = key();
        let mut params = CertificateParams::new(vec![host.to_string()]).unwrap();
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        change(&mut params);
        let cert = params.signed_by(&key, &self.0).unwrap().pem();
        let file = |name: &str, text: &str| {
            let path = dir.join(name);
            std::fs::write(&path, text).unwrap();
            path
        };
        TlsFiles {
            cert: file("cert.pem", &cert),
            key: file("key.pem", &key.serialize_pem()),
            ca: file("ca.pem", &self.1),
        }
    }
}

fn key() -> KeyPair {
    KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap()
}

fn expired(params: &mut CertificateParams) {
    params.not_after = rcgen::date_time_ymd(2020, 1, 1);
}

/// As it would be after a time: what it has was good once.
fn unchecked(files: TlsFiles) -> RpcTls {
    let material = Material::read(&files).unwrap();
    RpcTls::of(files.clone(), Stamp::of(&files), material)
}

/// What the side that connects and the one that is connected to say. The former writes and reads, as a broker does.
async fn meet(client: &RpcTls, server: &RpcTls) -> (Result<(), String>, Result<(), String>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let hello = || VecDeque::from([Bytes::from_static(b"hello")]);
    let connects = async {
        let mut stream = Stream::connect(&address, Some(client)).await?;
        let said = async {
            stream.writes.write(&mut hello()).await?;
            let mut input = BytesMut::new();
            match stream.reads.read(&mut input).await? {
                0 => Err(LinkError::Closed),
                _ => Ok(()),
            }
        };
        said.await.map_err(|error| client.explain(error, "the broker"))
    };
    let accepts = async {
        let (stream, _) = listener.accept().await.unwrap();
        let mut stream = Stream::tls(server.accept(stream, "a peer").await?);
        // As it goes to another thread.
        stream = stream.detach()?.attach()?;
        let mut input = BytesMut::new();
        stream.reads.read(&mut input).await?;
        assert_eq!(&input[..], b"hello");
        stream.writes.write(&mut hello()).await
    };
    let (connected, accepted) = tokio::join!(connects, accepts);
    (connected.map_err(|error| error.to_string()), accepted.map_err(|error: LinkError| error.to_string()))
}

async fn refused(client: &RpcTls, server: &RpcTls) -> [String; 2] {
    let (connected, accepted) = meet(client, server).await;
    [connected.unwrap_err(), accepted.unwrap_err()]
}

fn assert_says(said: &[String; 2], connects: &str, accepts: &str) {
    assert!(said[0].contains(connects) && said[1].contains(accepts), "{said:#?}");
    assert!(said.iter().all(|sentence| !sentence.contains("PRIVATE")), "{said:#?}");
}

#[tokio::test]
async fn brokers_of_one_authority_meet_and_others_hear_why_not() {
    let dir = tempfile::tempdir().unwrap();
    let (own, other) = (Authority::new(), Authority::new());
    let at = |name: &str| dir.path().join(name);
    let one = RpcTls::load(own.files(&at("one"), "127.0.0.1", |_| {})).unwrap();
    let two = RpcTls::load(own.files(&at("two"), "127.0.0.1", |_| {})).unwrap();
    assert_eq!(meet(&one, &two).await, (Ok(()), Ok(())));

    // Whoever connects looks first.
    let stranger = RpcTls::load(other.files(&at("stranger"), "127.0.0.1", |_| {})).unwrap();
    let said = refused(&stranger, &one).await;
    assert_says(&said, "is not signed by the authority in", "does not trust the certificate");
    // One that trusts both authorities is not trusted for that.
    std::fs::write(at("stranger").join("ca.pem"), format!("{}{}", own.1, other.1)).unwrap();
    let stranger = RpcTls::load(stranger.files.clone()).unwrap();
    let said = refused(&stranger, &one).await;
    assert_says(&said, "does not trust the certificate", "is not signed by the authority in");

    let old = unchecked(own.files(&at("old"), "127.0.0.1", expired));
    assert_says(&refused(&old, &one).await, "finds the certificate", "has expired");
    assert_says(&refused(&one, &old).await, "has expired", "finds the certificate");

    let elsewhere = RpcTls::load(own.files(&at("elsewhere"), "10.9.9.9", |_| {})).unwrap();
    assert_eq!(
        meet(&elsewhere, &one).await,
        (Ok(()), Ok(())),
        "only the address that is connected to counts"
    );
    let said = refused(&one, &elsewhere).await;
    assert_says(&said, "is not for 127.0.0.1, where the broker is reached, but for", "subjectAltName");

    let server_only = |params: &mut CertificateParams| {
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth]
    };
    let server_only = unchecked(own.files(&at("server"), "127.0.0.1", server_only));
    let said = refused(&server_only, &one).await;
    assert_says(&said, "extendedKeyUsage=serverAuth,clientAuth", "extendedKeyUsage=serverAuth,clientAuth");
}

#[tokio::test]
async fn a_peer_without_a_certificate_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let one = RpcTls::load(Authority::new().files(dir.path(), "127.0.0.1", |_| {})).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let mut roots = RootCertStore::empty();
    roots.add(certificates(&one.files.ca).unwrap().remove(0)).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let bare = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let connects = async {
        let stream = TcpStream::connect(address).await.unwrap();
        let name = ServerName::try_from("127.0.0.1").unwrap();
        let stream = TlsConnector::from(Arc::new(bare)).connect(name, Socket::new(stream)).await.unwrap();
        let mut stream = Stream::tls(stream.into());
        let error = stream.reads.read(&mut BytesMut::new()).await.unwrap_err();
        one.explain(error.into(), "the broker").to_string()
    };
    let accepts = async {
        let (stream, _) = listener.accept().await.unwrap();
        one.accept(stream, "a peer").await.map(drop).unwrap_err().to_string()
    };
    let (connected, accepted) = tokio::join!(connects, accepts);
    assert!(connected.contains("CertificateRequired"), "{connected}");
    assert!(
        accepted.contains("a peer has shown no certificate; if it is a broker, start it with"),
        "{accepted}"
    );
}

#[tokio::test]
async fn what_is_no_handshake_ends_and_keeps_little() {
    let dir = tempfile::tempdir().unwrap();
    let one = RpcTls::load(Authority::new().files(dir.path(), "127.0.0.1", |_| {})).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    // A record that promises a handshake message of 16 MiB, and goes on and on.
    let mut flood = vec![0x16, 3, 1, 0x40, 0, 1, 0xff, 0xff, 0xff];
    flood.resize(5 + 0x4000, 7);
    let floods = tokio::spawn(async move {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let mut sent = 0;
        while sent < 64 << 20 && stream.write_all(&flood).await.is_ok() {
            sent += flood.len();
        }
        sent
    });
    let (stream, _) = listener.accept().await.unwrap();
    assert!(one.accept(stream, "a peer").await.is_err());
    let sent = floods.await.unwrap();
    assert!(sent < 64 << 20, "{sent} bytes were taken");
    // One that says nothing does not last.
    let silent = TcpStream::connect(address).await.unwrap();
    let (stream, _) = listener.accept().await.unwrap();
    assert!(matches!(one.accept(stream, "a peer").await, Err(LinkError::Silent)));
    drop(silent);
}

/// Records of several kinds of size arrive as they were, also when the other side takes them slowly.
#[tokio::test]
async fn segments_of_any_size_arrive_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let one = RpcTls::load(Authority::new().files(dir.path(), "127.0.0.1", |_| {})).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let segments: Vec<Bytes> =
        (0..300_usize).map(|n| Bytes::from(vec![n as u8; [0, 1, 16, 20_000, 0, 300_000][n % 6]])).collect();
    let whole = segments.concat();
    let sends = async {
        let mut stream = Stream::connect(&address, Some(&one)).await.unwrap();
        let mut batch = VecDeque::from(segments);
        stream.writes.write(&mut batch).await.unwrap();
        assert!(batch.is_empty());
        // All that was taken has left: nothing more is written.
        let mut nothing = BytesMut::new();
        assert_eq!(stream.reads.read(&mut nothing).await.unwrap(), 0);
    };
    let takes = async {
        let (stream, _) = listener.accept().await.unwrap();
        let mut stream = Stream::tls(one.accept(stream, "a peer").await.unwrap());
        let mut input = BytesMut::new();
        while input.len() < whole.len() {
            assert_ne!(stream.reads.read(&mut input).await.unwrap(), 0);
        }
        assert!(input == whole);
    };
    tokio::join!(sends, takes);
}

#[test]
fn files_that_cannot_be_right_are_refused_in_words() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let own = Authority::new();
    let good = own.files(&at("good"), "127.0.0.1", |_| {});
    assert!(RpcTls::load(good.clone()).unwrap().serve_at("127.0.0.1:33145").is_ok());
    let load = |files: TlsFiles| RpcTls::load(files).map(drop).unwrap_err();
    let of = |change: fn(&mut TlsFiles)| {
        let mut files = good.clone();
        change(&mut files);
        load(files)
    };
    assert!(of(|files| files.cert = "/nowhere".into()).contains("cannot read /nowhere"));
    assert!(of(|files| files.cert.clone_from(&files.key)).contains("holds no certificate"));
    assert!(of(|files| files.key.clone_from(&files.ca)).contains("holds no private key"));
    assert!(of(|files| files.ca.clone_from(&files.key)).contains("holds no certificate"));
    let other = Authority::new();
    let foreign = other.files(&at("foreign"), "127.0.0.1", |_| {});
    let sentence = load(TlsFiles { key: foreign.key.clone(), ..good.clone() });
    assert!(sentence.contains("is not the key of"), "{sentence}");
    let sentence = load(TlsFiles { ca: foreign.ca.clone(), ..good.clone() });
    assert!(sentence.contains("is not signed by the authority in"), "{sentence}");
    let sentence = load(own.files(&at("old"), "127.0.0.1", expired));
    assert!(sentence.contains("has expired"), "{sentence}");
    let sentence =
        load(own.files(&at("young"), "127.0.0.1", |p| p.not_before = rcgen::date_time_ymd(4000, 1, 1)));
    assert!(sentence.contains("is not valid yet"), "{sentence}");
    let named = RpcTls::load(own.files(&at("named"), "db1.example", |_| {})).unwrap();
    let sentence = named.serve_at("10.0.0.1:33145").unwrap_err();
    assert!(sentence.contains("not for 10.0.0.1") && sentence.contains("but for db1.example;"), "{sentence}");
    let named = RpcTls::load(named.files.clone()).unwrap();
    assert_eq!(named.serve_at("db1.example:33145"), Ok(()));
    assert_eq!(host_of("[fd00::1]:33145"), "fd00::1");
    // Text without end is not read to its end.
    std::fs::write(&good.ca, vec![b'x'; 3 << 20]).unwrap();
    assert!(load(good).contains("holds no certificate"));
}

#[test]
fn what_an_operator_should_know_of_certificates() {
    let dir = tempfile::tempdir().unwrap();
    let files = Authority::new().files(dir.path(), "127.0.0.1", |params| {
        params.not_before = rcgen::date_time_ymd(2020, 1, 1);
        params.not_after = rcgen::date_time_ymd(2030, 1, 1);
    });
    let material = Material::read(&files).unwrap();
    let at = |days_before_2030: i64| {
        let seconds = 1_893_456_000 - days_before_2030 * 24 * 3600;
        material.trouble(UnixTime::since_unix_epoch(Duration::from_secs(seconds.try_into().unwrap())))
    };
    assert_eq!((at(15), at(13), at(-1)), (None, Some(Trouble::ExpiresSoon), Some(Trouble::Expired)));
    let debug = format!("{:?}", unchecked(files));
    assert!(debug.contains("key.pem") && !debug.contains("PRIVATE"), "{debug}");
}

#[test]
fn changed_files_are_read_when_nobody_writes_any_more() {
    let stamp = |n: u64| Stamp([Some((n, 0, 0, 0)), None, None]);
    let mut rotation = Rotation { read: stamp(1), seen: stamp(1) };
    let looks = [1, 2, 3, 3, 3, 1, 3, 3, 4, 4].map(|n| rotation.look(stamp(n)));
    assert_eq!(looks, [false, false, false, true, false, false, false, false, false, true]);
}

#[tokio::test]
async fn new_files_come_into_force_and_bad_ones_do_not() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let (own, other) = (Authority::new(), Authority::new());
    let one = RpcTls::load(own.files(&at("one"), "127.0.0.1", |_| {})).unwrap();
    let two = RpcTls::load(own.files(&at("two"), "127.0.0.1", |_| {})).unwrap();
    one.serve_at("127.0.0.1:1").unwrap();
    let chain = |tls: &RpcTls| tls.in_force.load().chain.clone();
    let before = chain(&one);
    std::fs::write(&one.files.key, "nothing").unwrap();
    one.read_again();
    assert!(matches!(one.trouble(), Some(Trouble::NotReadAgain(_))));
    own.files(&at("one"), "127.0.0.1", expired);
    one.read_again();
    assert!(matches!(one.trouble(), Some(Trouble::NotReadAgain(why)) if why.contains("has expired")));
    own.files(&at("one"), "10.0.0.1", |_| {});
    one.read_again();
    assert!(matches!(one.trouble(), Some(Trouble::NotReadAgain(why)) if why.contains("not for 127.0.0.1")));
    assert_eq!(chain(&one), before);
    assert_eq!(meet(&two, &one).await, (Ok(()), Ok(())));
    other.files(&at("one"), "127.0.0.1", |_| {});
    one.read_again();
    assert_eq!(one.trouble(), None);
    assert_ne!(chain(&one), before);
    assert!(refused(&two, &one).await[0].contains("is not signed by the authority"));
}
