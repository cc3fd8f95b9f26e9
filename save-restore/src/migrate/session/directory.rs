//! A directory with the keys of an end: `ca.pem`, `cert.pem`, `key.pem`, and for a receiver
//! `allow`.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::RootCertStore;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::HandshakeSignatureValid;
use rustls::client::verify_server_name;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, SignatureScheme};

use super::tls::{ClientTls, KeyError, ServerTls, client_builder, cryptography, server_builder};

/// The keys of an end, read from a directory.
#[derive(Debug)]
pub struct KeyDirectory {
    path: PathBuf,
    authority: Arc<RootCertStore>,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
}

impl KeyDirectory {
    /// Reads the directory, except for its list of clients.
    ///
    /// # Errors
    ///
    /// A file cannot be read, or is not what its name says; other users can read the key
    /// or own it.
    pub fn open(path: &Path) -> Result<Self, KeyError> {
        let mut authority = RootCertStore::empty();
        for certificate in certificates(&path.join("ca.pem"))? {
            authority.add(certificate)?;
        }
        let file = path.join("key.pem");
        private(&file)?;
        let key = PrivateKeyDer::from_pem_file(&file);
        Ok(Self {
            path: path.to_owned(),
            authority: Arc::new(authority),
            chain: certificates(&path.join("cert.pem"))?,
            key: key.map_err(|why| wrong(&file, &why))?,
        })
    }

    /// A client that takes only a server whose certificate has this name, which may be an address.
    ///
    /// # Errors
    ///
    /// The name cannot be one, or certificate and key do not fit together.
    pub fn client(&self, server: &str) -> Result<ClientTls, KeyError> {
        let name = ServerName::try_from(server.to_owned());
        let name = name.map_err(|_| KeyError::Name(server.to_owned()))?;
        let cryptography = cryptography();
        let verifier = WebPkiServerVerifier::builder_with_provider(
            Arc::clone(&self.authority),
            Arc::clone(&cryptography),
        );
        let verifier = verifier.build().map_err(|why| self.wrong(&why))?;
        let config = client_builder(&cryptography)?
            .with_webpki_verifier(verifier)
            .with_client_auth_cert(self.chain.clone(), self.key.clone_key())?;
        Ok(ClientTls::new(config, name))
    }

    /// A server that takes only clients with a name in `allow`: one on a line, and comments after
    /// `#`. Without that file it takes none.
    ///
    /// # Errors
    ///
    /// `allow` cannot be read or holds something that is not a name; certificate and key do not fit
    /// together.
    pub fn server(&self) -> Result<ServerTls, KeyError> {
        let cryptography = cryptography();
        let verifier = WebPkiClientVerifier::builder_with_provider(
            Arc::clone(&self.authority),
            Arc::clone(&cryptography),
        );
        let verifier = Arc::new(Allowed {
            certified: verifier.build().map_err(|why| self.wrong(&why))?,
            names: self.allowed()?,
        });
        let config = server_builder(&cryptography)?
            .with_client_cert_verifier(verifier)
            .with_single_cert(self.chain.clone(), self.key.clone_key())?;
        Ok(ServerTls::new(config))
    }

    fn allowed(&self) -> Result<Vec<ServerName<'static>>, KeyError> {
        let path = self.path.join("allow");
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(cause) if cause.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(cause) => return Err(KeyError::File { path, cause }),
        };
        let lines = text.lines().map(|line| {
            let name = line.split_once('#').map_or(line, |(name, _)| name);
            name.trim()
        });
        let names = lines.filter(|name| !name.is_empty()).map(|name| {
            let parsed = ServerName::try_from(name.to_owned());
            parsed.map_err(|_| KeyError::Contents {
                path: path.clone(),
                why: format!("{name:?} is not a host name or address"),
            })
        });
        names.collect()
    }

    fn wrong(&self, why: &impl std::fmt::Display) -> KeyError {
        wrong(&self.path.join("ca.pem"), why)
    }
}

fn wrong(path: &Path, why: &impl std::fmt::Display) -> KeyError {
    KeyError::Contents {
        path: path.to_owned(),
        why: why.to_string(),
    }
}

/// The certificates of a file, at least one.
fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, KeyError> {
    let read = CertificateDer::pem_file_iter(path)
        .and_then(|certificates| certificates.collect::<Result<Vec<_>, _>>())
        .map_err(|why| wrong(path, &why))?;
    match read.is_empty() {
        true => Err(wrong(path, &"no certificate")),
        false => Ok(read),
    }
}

/// Refuses a key that other users can read, or that belongs to one of them.
fn private(path: &Path) -> Result<(), KeyError> {
    let metadata = fs::metadata(path).map_err(|cause| KeyError::File {
        path: path.to_owned(),
        cause,
    })?;
    let mode = metadata.mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(KeyError::Readable(path.to_owned(), mode));
    }
    match metadata.uid() {
        0 => Ok(()),
        own if own == nix::unistd::geteuid().as_raw() => Ok(()),
        other => Err(KeyError::Owner(path.to_owned(), other)),
    }
}

/// Whether a certificate has a name such as `*.example.org`, which stands for many hosts. `allow`
/// names single ones.
fn is_wildcard(certificate: &CertificateDer<'_>) -> Result<bool, rustls::Error> {
    let parsed = webpki::EndEntityCert::try_from(certificate);
    let parsed = parsed.map_err(|_| CertificateError::BadEncoding)?;
    Ok(parsed.valid_dns_names().any(|name| name.starts_with('*')))
}

/// Takes a client whose certificate the CA has signed and has one of the names.
#[derive(Debug)]
struct Allowed {
    certified: Arc<dyn ClientCertVerifier>,
    names: Vec<ServerName<'static>>,
}

impl ClientCertVerifier for Allowed {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.certified.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let verified = self
            .certified
            .verify_client_cert(certificate, intermediates, now)?;
        if is_wildcard(certificate)? {
            return Err(CertificateError::NotValidForName.into());
        }
        let parsed = ParsedCertificate::try_from(certificate)?;
        let mut names = self.names.iter();
        match names.any(|name| verify_server_name(&parsed, name).is_ok()) {
            true => Ok(verified),
            false => Err(CertificateError::ApplicationVerificationFailure.into()),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.certified
            .verify_tls12_signature(message, certificate, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.certified
            .verify_tls13_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.certified.supported_verify_schemes()
    }
}
