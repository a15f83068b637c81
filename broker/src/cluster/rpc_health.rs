//! What is wrong with how this broker and the others know each other, for `cluster_health`. The judgement is pure.

use super::Cluster;
use super::tls::{TlsFiles, Trouble};
use crate::cluster_health::{Problem, Severity};

pub fn problem(cluster: &Cluster) -> Option<Problem> {
    let node_id = cluster.identity.node_id;
    match &cluster.tls {
        Some(tls) => Some(of_certificates(node_id, tls.files(), &tls.trouble()?)),
        None => cluster.is_exposed.then(|| of_plain_port(node_id, &cluster.address)),
    }
}

fn of_plain_port(node_id: i32, address: &str) -> Problem {
    Problem {
        code: "RPC_NOT_ENCRYPTED",
        severity: Severity::Warning,
        node_id,
        subject: format!("the port for brokers at {address}"),
        detail: "it is not on loopback, and brokers show no certificates there (--rpc-plaintext)".to_string(),
        impact: "whoever reaches it can act as a broker: read all records, and change them".to_string(),
        fix: "give every broker --rpc-tls-cert, --rpc-tls-key and --rpc-tls-ca (docs/OPERATE.md); if nobody but brokers reaches \
              that network, leave it"
            .to_string(),
    }
}

fn of_certificates(node_id: i32, files: &TlsFiles, trouble: &Trouble) -> Problem {
    let cert = files.cert.display();
    let renew =
        || format!("replace {cert} and {}; they are read again without a restart", files.key.display());
    let (code, severity, detail, impact, fix) = match trouble {
        Trouble::Expired => (
            "RPC_CERTIFICATE_EXPIRED",
            Severity::Error,
            format!("the certificate {cert} has expired"),
            "connections to other brokers last until they end; none comes about anew",
            renew(),
        ),
        Trouble::ExpiresSoon => (
            "RPC_CERTIFICATE_EXPIRES",
            Severity::Warning,
            format!("the certificate {cert} expires within 14 days"),
            "after that no connection to another broker comes about",
            renew(),
        ),
        Trouble::NotReadAgain(why) => (
            "RPC_CERTIFICATE_UNUSABLE",
            Severity::Warning,
            format!("the certificates changed and cannot be used: {why}"),
            "the old ones stay in force, until they expire or this broker is started again",
            "mend what the reason says; the files are read again when they change".to_string(),
        ),
    };
    let (subject, impact) = (cert.to_string(), impact.to_string());
    Problem { code, severity, node_id, subject, detail, impact, fix }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_expired_certificate_is_an_error_and_all_say_what_to_do() {
        let files = TlsFiles { cert: "n1.pem".into(), key: "n1.key".into(), ca: "ca.pem".into() };
        let of = |trouble| of_certificates(1, &files, &trouble);
        let found = [
            of(Trouble::Expired),
            of(Trouble::ExpiresSoon),
            of(Trouble::NotReadAgain("why".to_string())),
            of_plain_port(1, "10.0.0.1:33145"),
        ];
        let severities: Vec<_> = found.iter().map(|problem| problem.severity).collect();
        assert_eq!(severities, [Severity::Error, Severity::Warning, Severity::Warning, Severity::Warning]);
        assert!(found[0].fix.contains("n1.key") && found[2].detail.ends_with("why"));
        assert!(found[3].subject.contains("10.0.0.1:33145") && found[3].fix.contains("--rpc-tls-cert"));
    }
}
