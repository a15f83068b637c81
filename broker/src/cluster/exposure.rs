//! Whether the port for brokers may be open as the operator wants it. Pure.
//!
//! Whoever reaches that port without being asked for a certificate can act as a broker: read all records, and change them. So
//! it is plain only where nobody else comes, on loopback, or where the operator says so.

use std::net::{IpAddr, SocketAddr};

use super::tls::{TlsFiles, host_of};

/// How brokers know each other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Security {
    Tls(TlsFiles),
    /// `accepted`: the operator says that nobody but brokers reaches the port.
    Plain {
        accepted: bool,
    },
}

/// Whether others than this machine may reach the port.
pub fn is_exposed(rpc: SocketAddr, advertised: Option<&str>) -> bool {
    !rpc.ip().to_canonical().is_loopback() || advertised.is_some_and(|address| !is_loopback(host_of(address)))
}

fn is_loopback(host: &str) -> bool {
    match host.parse::<IpAddr>() {
        Ok(ip) => ip.to_canonical().is_loopback(),
        Err(_) => host.eq_ignore_ascii_case("localhost"),
    }
}

pub fn check(rpc: SocketAddr, advertised: Option<&str>, security: &Security) -> Result<(), String> {
    if !is_exposed(rpc, advertised) || *security != (Security::Plain { accepted: false }) {
        return Ok(());
    }
    let address = match advertised {
        Some(advertised) if rpc.ip().to_canonical().is_loopback() => format!("--advertise-rpc {advertised}"),
        _ => format!("--rpc {rpc}"),
    };
    Err(format!(
        "{address} is not on loopback, and without certificates whoever reaches it can act as a broker, read all records and \
         change them; give --rpc-tls-cert, --rpc-tls-key and --rpc-tls-ca (docs/OPERATE.md says how to make them), or, on a \
         network of the brokers' own, --rpc-plaintext"
    ))
}

/// Three files or none, of the command line or the configuration.
pub fn security(
    cert: Option<std::path::PathBuf>,
    key: Option<std::path::PathBuf>,
    ca: Option<std::path::PathBuf>,
    plaintext: bool,
) -> Result<Security, String> {
    match (cert, key, ca) {
        (None, None, None) => Ok(Security::Plain { accepted: plaintext }),
        (Some(_), Some(_), Some(_)) if plaintext => {
            Err("--rpc-plaintext and certificates for --rpc exclude each other; leave one of them out"
                .to_string())
        }
        (Some(cert), Some(key), Some(ca)) => Ok(Security::Tls(TlsFiles { cert, key, ca })),
        _ => {
            Err("--rpc-tls-cert, --rpc-tls-key and --rpc-tls-ca go together; give all three or none"
                .to_string())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_that_others_reach_is_plain_only_when_somebody_says_so() {
        let plain = Security::Plain { accepted: false };
        let tls = Security::Tls(TlsFiles { cert: "c".into(), key: "k".into(), ca: "a".into() });
        for (rpc, advertised, exposed) in [
            ("127.0.0.1:1", None, false),
            ("127.9.9.9:1", Some("localhost:1"), false),
            ("[::1]:1", Some("[::1]:1"), false),
            ("[::ffff:127.0.0.1]:1", Some("127.0.0.1:1"), false),
            ("0.0.0.0:1", None, true),
            ("0.0.0.0:1", Some("127.0.0.1:1"), true),
            ("[::]:1", None, true),
            ("10.0.0.1:1", None, true),
            ("[::ffff:10.0.0.1]:1", None, true),
            ("127.0.0.1:1", Some("10.0.0.1:1"), true),
            ("127.0.0.1:1", Some("localhost.example:1"), true),
            ("127.0.0.1:1", Some("[fd00::1]:1"), true),
        ] {
            let rpc: SocketAddr = rpc.parse().unwrap();
            assert_eq!(is_exposed(rpc, advertised), exposed, "{rpc} {advertised:?}");
            let checked = check(rpc, advertised, &plain);
            assert_eq!(checked.is_err(), exposed);
            if let Err(sentence) = checked {
                assert!(sentence.contains("--rpc-tls-cert") && sentence.contains("--rpc-plaintext"));
                let named =
                    advertised.filter(|_| rpc.ip().is_loopback()).map_or(rpc.to_string(), str::to_string);
                assert!(sentence.contains(&named), "{sentence}");
            }
            assert_eq!(check(rpc, advertised, &tls), Ok(()));
            assert_eq!(check(rpc, advertised, &Security::Plain { accepted: true }), Ok(()));
        }
    }

    #[test]
    fn three_files_or_none() {
        let some = |name: &str| Some(name.into());
        assert_eq!(security(None, None, None, true), Ok(Security::Plain { accepted: true }));
        let files = TlsFiles { cert: "c".into(), key: "k".into(), ca: "a".into() };
        assert_eq!(security(some("c"), some("k"), some("a"), false), Ok(Security::Tls(files)));
        assert!(security(some("c"), some("k"), some("a"), true).unwrap_err().contains("exclude"));
        for two in [(None, some("k"), some("a")), (some("c"), None, some("a")), (some("c"), some("k"), None)]
        {
            assert!(security(two.0, two.1, two.2, false).unwrap_err().contains("all three"));
        }
    }
}
