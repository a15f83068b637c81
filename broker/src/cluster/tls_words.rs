//! What went wrong with TLS between two brokers, in one sentence that says what to do. Pure; the words are the same on both
//! sides of a connection, and hold nothing of a key.

use std::io;

use rustls::{AlertDescription, CertificateError, Error, InvalidMessage};

use super::tls::TlsFiles;

/// Of what rustls says, some of which others have sent.
const QUOTED_CHARS_MAX: usize = 200;

fn quoted(what: impl std::fmt::Display) -> String {
    what.to_string().chars().filter(|c| !c.is_control()).take(QUOTED_CHARS_MAX).collect()
}

/// The names of a certificate, which rustls has as IpAddress(10.0.0.1) and DnsName("db1.example").
fn names(presented: &[String]) -> String {
    if presented.is_empty() {
        return "no address at all".to_string();
    }
    let name = |text: &String| {
        let inside = text.split_once('(').and_then(|(_, rest)| rest.strip_suffix(')')).unwrap_or(text);
        inside.trim_matches('"').to_string()
    };
    quoted(presented.iter().map(name).collect::<Vec<_>>().join(", "))
}

/// The error of rustls inside one of a stream, if there is one.
pub fn cause(error: &io::Error) -> Option<&Error> {
    error.get_ref()?.downcast_ref()
}

/// Of a handshake that did not come about. `peer` is who it is about: "the broker at 10.0.0.2:33145".
pub fn of_handshake(error: &io::Error, peer: &str, files: &TlsFiles) -> String {
    if let Some(cause) = cause(error) {
        return of_peer(cause, peer, files);
    }
    match error.kind() {
        io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => format!(
            "{peer} closed the connection when TLS began; if it runs without certificates, start it with --rpc-tls-cert, \
             --rpc-tls-key and --rpc-tls-ca; if not, its log says why"
        ),
        _ => format!("TLS with {peer} failed: {error}"),
    }
}

/// Of an error that the other side, or what it sent, is the reason of.
pub fn of_peer(error: &Error, peer: &str, files: &TlsFiles) -> String {
    let (cert, ca) = (files.cert.display(), files.ca.display());
    match error {
        Error::NoCertificatesPresented => format!(
            "{peer} has shown no certificate; if it is a broker, start it with --rpc-tls-cert, --rpc-tls-key and --rpc-tls-ca"
        ),
        Error::InvalidCertificate(error) => {
            of_certificate(error, &format!("the certificate of {peer}"), files)
        }
        Error::AlertReceived(AlertDescription::UnknownCA | AlertDescription::DecryptError) => format!(
            "{peer} does not trust the certificate {cert}: its --rpc-tls-ca is another authority; give all brokers certificates \
             of one"
        ),
        Error::AlertReceived(AlertDescription::CertificateExpired) => format!(
            "{peer} finds the certificate {cert} expired, or not valid yet; replace {cert} and its key (they are read again \
             without a restart), or set the clocks of both machines right"
        ),
        Error::AlertReceived(AlertDescription::BadCertificate) => format!(
            "{peer} does not find the address at which it reached this broker in the certificate {cert}; make one with that \
             address in its subjectAltName"
        ),
        Error::AlertReceived(AlertDescription::UnsupportedCertificate) => format!(
            "{peer} may not take the certificate {cert} for this; make one with extendedKeyUsage=serverAuth,clientAuth"
        ),
        Error::AlertReceived(alert) => {
            format!("{peer} refuses this broker or its certificate {cert} ({alert:?}); its log says why")
        }
        Error::PeerIncompatible(what) => {
            let what = quoted(format!("{what:?}"));
            format!("{peer} does not speak TLS 1.3 as brokers do ({what}); only brokers may connect here")
        }
        Error::InvalidMessage(InvalidMessage::InvalidContentType) => format!(
            "{peer} does not speak TLS; if it is a broker, start it with --rpc-tls-cert, --rpc-tls-key and --rpc-tls-ca"
        ),
        other => {
            let what = quoted(other);
            format!("TLS with {peer} failed: {what}; its certificate has to be of the authority in {ca}")
        }
    }
}

/// Of a certificate that is not taken. `which` names it.
pub fn of_certificate(error: &CertificateError, which: &str, files: &TlsFiles) -> String {
    let ca = files.ca.display();
    match error {
        CertificateError::UnknownIssuer | CertificateError::BadSignature => {
            format!(
                "{which} is not signed by the authority in {ca}; give all brokers certificates of one (--rpc-tls-ca)"
            )
        }
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => format!(
            "{which} has expired; replace it (a broker reads its files again without a restart), or set the clocks of both \
             machines right"
        ),
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
            format!("{which} is not valid yet; set the clocks of both machines right, or replace it")
        }
        CertificateError::NotValidForNameContext { expected, presented } => format!(
            "{which} is not for {}, where the broker is reached, but for {}; make one with that address in its subjectAltName, or \
             correct --advertise-rpc and --seeds",
            expected.to_str(),
            names(presented),
        ),
        CertificateError::NotValidForName => format!(
            "{which} is not for the address where the broker is reached; make one with that address in its subjectAltName"
        ),
        CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => format!(
            "{which} may not be used by both sides of a connection; make one with extendedKeyUsage=serverAuth,clientAuth"
        ),
        other => format!("{which} cannot be used ({}); make one as docs/OPERATE.md says", quoted(other)),
    }
}

/// What a broker without TLS is told by one that has certificates.
pub const PLAIN_IS_REFUSED: &str = "this broker speaks without TLS to one that has certificates; start it with --rpc-tls-cert, \
     --rpc-tls-key and --rpc-tls-ca, as the others are";

/// Of one that connects without TLS to a broker that has certificates.
pub fn of_plain_peer(peer: &str) -> String {
    format!(
        "{peer} speaks without TLS to one that has certificates; start it with --rpc-tls-cert, --rpc-tls-key and --rpc-tls-ca"
    )
}

/// Of one that begins with TLS on a port without.
pub fn of_tls_peer(peer: &str) -> String {
    format!(
        "{peer} speaks TLS, and this broker has no certificates; start this one with --rpc-tls-cert, --rpc-tls-key and \
         --rpc-tls-ca as well"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_others_sent_is_quoted_short_and_names_as_people_write_them() {
        let presented = ["IpAddress(10.0.0.1)".to_string(), "DnsName(\"db1.example\")".to_string()];
        assert_eq!(names(&presented), "10.0.0.1, db1.example");
        assert_eq!(names(&[]), "no address at all");
        assert_eq!(names(&["odd".to_string()]), "odd");
        assert_eq!(quoted("a\nb".repeat(1000)).len(), QUOTED_CHARS_MAX);
        assert!(!quoted("a\n\u{1b}[1m").contains(char::is_control));
    }
}
