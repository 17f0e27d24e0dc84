//! Mutual TLS: what the server shows, whom it believes, and who a client is by his certificate.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use rustls::{
    RootCertStore, ServerConfig,
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    server::{NoServerSessionStorage, WebPkiClientVerifier},
};
use x509_parser::{
    extensions::GeneralName,
    prelude::{FromDer, X509Certificate},
};

/// Refuses a key that others on this host can read.
pub fn check_key(path: &Path) -> Result<()> {
    let mode = fs::metadata(path).with_context(|| format!("read {}", path.display()))?.permissions().mode();
    let others = mode & 0o077;
    ensure!(
        others == 0,
        "--tls-key: {}: mode {:o} lets others at the key; chmod 600 {0}",
        path.display(),
        mode & 0o777
    );
    Ok(())
}

/// A server with this certificate and key, for clients with a certificate of this CA; all PEM.
pub fn server(certificate: &[u8], key: &[u8], client_ca: &[u8]) -> Result<ServerConfig> {
    let provider = Arc::new(ring::default_provider());
    let mut roots = RootCertStore::empty();
    for root in certificates(client_ca).context("--tls-client-ca")? {
        roots.add(root).context("--tls-client-ca")?;
    }
    let verifier =
        WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider)).build()?;
    let key =
        PrivateKeyDer::from_pem_slice(key).map_err(|e| anyhow!("--tls-key: no private key in PEM: {e}"))?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_client_cert_verifier(verifier)
        .with_single_cert(certificates(certificate).context("--tls-cert")?, key)
        .context("--tls-cert and --tls-key do not go together")?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    // A session that is taken up again would pass by a certificate that expired meanwhile.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(config)
}

/// The certificates of a PEM file; there is at least one.
pub fn certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>> {
    let all: Vec<_> = CertificateDer::pem_slice_iter(pem).collect::<Result<_, _>>()?;
    if all.is_empty() {
        bail!("no certificate in PEM");
    }
    Ok(all)
}

/// Whom a certificate names.
#[derive(Debug, PartialEq, Eq)]
pub struct Subject {
    /// Its URIs; without any its DNS names as `dns:NAME`; without those its common name as `cn:NAME`.
    pub names: Vec<String>,
    /// For how long it is still valid.
    pub left: Duration,
}

/// Who a verified certificate is about.
pub fn subject(certificate: &CertificateDer<'_>) -> Result<Subject> {
    let (_, x509) = X509Certificate::from_der(certificate).context("the client's certificate")?;
    let alternatives = x509.subject_alternative_name()?.map(|san| san.value.general_names.as_slice());
    let alternatives = alternatives.unwrap_or_default();
    let mut names: Vec<String> = alternatives
        .iter()
        .filter_map(|name| if let GeneralName::URI(uri) = name { Some((*uri).to_owned()) } else { None })
        // What has no authority could pass for a name of another kind: `uid:0`.
        .filter(|uri| uri.contains("://"))
        .collect();
    if names.is_empty() {
        let dns = |name: &GeneralName<'_>| {
            if let GeneralName::DNSName(dns) = name { Some(format!("dns:{dns}")) } else { None }
        };
        names = alternatives.iter().filter_map(dns).collect();
    }
    if names.is_empty() {
        names = x509
            .subject()
            .iter_common_name()
            .filter_map(|cn| cn.as_str().ok())
            .map(|cn| format!("cn:{cn}"))
            .collect();
    }
    ensure!(!names.is_empty(), "the client's certificate names nobody");
    let ends = UNIX_EPOCH + Duration::from_secs(x509.validity().not_after.timestamp().max(0) as u64);
    Ok(Subject { names, left: ends.duration_since(SystemTime::now()).unwrap_or_default() })
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, DnType, KeyPair, SanType};

    use super::*;

    fn named(cn: &str, sans: &[SanType]) -> Vec<String> {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, cn);
        params.subject_alt_names = sans.to_vec();
        let made = params.self_signed(&KeyPair::generate().unwrap()).unwrap();
        subject(made.der()).unwrap().names
    }

    #[test]
    fn a_client_is_its_uri_or_else_its_dns_name_or_else_its_common_name() {
        let uri = SanType::URI("spiffe://squall/ci".try_into().unwrap());
        let dns = SanType::DnsName("ci.example".try_into().unwrap());
        assert_eq!(named("x", &[dns.clone(), uri]), ["spiffe://squall/ci"]);
        assert_eq!(named("x", &[dns]), ["dns:ci.example"]);
        assert_eq!(named("x", &[SanType::URI("uid:0".try_into().unwrap())]), ["cn:x"]);
        assert_eq!(named("spiffe://squall/ci", &[]), ["cn:spiffe://squall/ci"]);
    }

    #[test]
    fn a_key_that_others_can_read_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        check_key(file.path()).unwrap();
        fs::set_permissions(file.path(), fs::Permissions::from_mode(0o640)).unwrap();
        let said = check_key(file.path()).unwrap_err().to_string();
        assert!(said.contains("mode 640") && said.contains("chmod 600"), "{said}");
    }
}
