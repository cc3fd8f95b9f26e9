//! TLS 1.3 on a link, and how the two ends know each other: one-time keys, which both have
//! exchanged by another way, or a directory with certificates.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use ring::rand::SystemRandom;
use ring::signature::Ed25519KeyPair;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{AlwaysResolvesClientRawPublicKeys, Resumption};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, ring as provider};
use rustls::pki_types::{
    CertificateDer, PrivatePkcs8KeyDer, ServerName, SubjectPublicKeyInfoDer, UnixTime,
};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{AlwaysResolvesServerRawPublicKeys, NoServerSessionStorage};
use rustls::sign::CertifiedKey;
use rustls::{
    CertificateError, ClientConfig, ClientConnection, DigitallySignedStruct, DistinguishedName,
    PeerIncompatible, ServerConfig, ServerConnection, SignatureScheme,
};
use thiserror::Error;

use super::wire::Wire;
use crate::migrate::connection::{Connection, ConnectionError, Wait};
use crate::progress::Cancel;

/// Why the keys of an end cannot be used.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum KeyError {
    /// A file cannot be read.
    #[error("{}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        cause: io::Error,
    },
    /// A file does not hold what it should.
    #[error("{}: {why}", path.display())]
    Contents {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// Other users can read the private key.
    #[error(
        "{}: other users can read this key (mode {mode:04o}); run chmod 600",
        .0.display(), mode = .1
    )]
    Readable(PathBuf, u32),
    /// Another user owns the private key.
    #[error(
        "{}: user {owner} owns this key, and can read and replace it; run chown",
        .0.display(), owner = .1
    )]
    Owner(PathBuf, u32),
    /// The name of the other end is not one that a certificate can have.
    #[error("{0}: not a host name or address")]
    Name(String),
    /// A key or certificate is refused.
    #[error("TLS")]
    Tls(#[from] rustls::Error),
    /// The operating system gives no random bytes.
    #[error("the operating system gives no random bytes")]
    Random,
}

/// The cryptography that TLS uses.
pub(super) fn cryptography() -> Arc<CryptoProvider> {
    Arc::new(provider::default_provider())
}

/// The settings of a client, up to how it knows the server.
pub(super) fn client_builder(
    cryptography: &Arc<CryptoProvider>,
) -> Result<rustls::ConfigBuilder<ClientConfig, rustls::WantsVerifier>, rustls::Error> {
    ClientConfig::builder_with_provider(Arc::clone(cryptography))
        .with_protocol_versions(&[&rustls::version::TLS13])
}

/// The settings of a server, up to how it knows its clients.
pub(super) fn server_builder(
    cryptography: &Arc<CryptoProvider>,
) -> Result<rustls::ConfigBuilder<ServerConfig, rustls::WantsVerifier>, rustls::Error> {
    ServerConfig::builder_with_provider(Arc::clone(cryptography))
        .with_protocol_versions(&[&rustls::version::TLS13])
}

/// What a client needs to make links with TLS.
#[derive(Clone, Debug)]
pub struct ClientTls {
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
}

impl ClientTls {
    /// Without tickets and early data.
    pub(super) fn new(mut config: ClientConfig, name: ServerName<'static>) -> Self {
        config.resumption = Resumption::disabled();
        config.enable_early_data = false;
        config.enable_sni = false;
        Self {
            config: Arc::new(config),
            name,
        }
    }

    /// Makes a link of a connection to the server.
    ///
    /// # Errors
    ///
    /// The connection fails, the server is not the right one, or the time is over.
    pub fn secure(
        &self,
        connection: Box<dyn Connection>,
        limit: Duration,
        cancel: &Cancel,
    ) -> Result<Wire, ConnectionError> {
        let session = ClientConnection::new(Arc::clone(&self.config), self.name.clone())
            .map_err(|error| ConnectionError::Local(io::Error::other(error)))?;
        let wait = Wait::forever().at_most(limit).unless(cancel);
        Wire::encrypted(connection, session.into(), &wait)
    }
}

/// What a server needs to make links with TLS.
#[derive(Clone, Debug)]
pub struct ServerTls {
    config: Arc<ServerConfig>,
}

impl ServerTls {
    /// Without tickets and early data.
    pub(super) fn new(mut config: ServerConfig) -> Self {
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        config.max_early_data_size = 0;
        Self {
            config: Arc::new(config),
        }
    }

    /// Makes a link of a connection from a client.
    ///
    /// # Errors
    ///
    /// The connection fails, the client is not allowed, or the time is over.
    pub fn secure(
        &self,
        connection: Box<dyn Connection>,
        limit: Duration,
        cancel: &Cancel,
    ) -> Result<Wire, ConnectionError> {
        let session = ServerConnection::new(Arc::clone(&self.config))
            .map_err(|error| ConnectionError::Local(io::Error::other(error)))?;
        let wait = Wait::forever().at_most(limit).unless(cancel);
        Wire::encrypted(connection, session.into(), &wait)
    }
}

/// A key for one session. Only its public half is ever told.
#[derive(Debug)]
pub struct OneTimeKey {
    key: Arc<CertifiedKey>,
    public: Vec<u8>,
}

impl OneTimeKey {
    /// The longest public key of a peer, in bytes.
    pub const LONGEST: usize = 128;

    /// A new key.
    ///
    /// # Errors
    ///
    /// [`KeyError::Random`].
    pub fn new() -> Result<Self, KeyError> {
        let pair = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new());
        let pair = pair.map_err(|_| KeyError::Random)?;
        let pair = PrivatePkcs8KeyDer::from(pair.as_ref());
        let key = provider::sign::any_eddsa_type(&pair)?;
        let public = key.public_key().ok_or(KeyError::Random)?.to_vec();
        let chain = vec![CertificateDer::from(public.clone())];
        Ok(Self {
            key: Arc::new(CertifiedKey::new(chain, key)),
            public,
        })
    }

    /// The public key, for the other end: a SubjectPublicKeyInfo in DER.
    pub fn public(&self) -> &[u8] {
        &self.public
    }

    /// A client with this key, which takes no server but the one with that key.
    ///
    /// # Errors
    ///
    /// [`KeyError::Tls`].
    pub fn client(&self, server: &[u8]) -> Result<ClientTls, KeyError> {
        let cryptography = cryptography();
        let config = client_builder(&cryptography)?
            .dangerous()
            .with_custom_certificate_verifier(Pinned::new(server, &cryptography))
            .with_client_cert_resolver(Arc::new(AlwaysResolvesClientRawPublicKeys::new(
                Arc::clone(&self.key),
            )));
        // A name is needed, and means nothing here.
        let name = "xsr".to_owned();
        let name = ServerName::try_from(name).map_err(|error| KeyError::Name(error.to_string()))?;
        Ok(ClientTls::new(config, name))
    }

    /// A server with this key, which takes no client but the one with that key.
    ///
    /// # Errors
    ///
    /// [`KeyError::Tls`].
    pub fn server(&self, client: &[u8]) -> Result<ServerTls, KeyError> {
        let cryptography = cryptography();
        let config = server_builder(&cryptography)?
            .with_client_cert_verifier(Pinned::new(client, &cryptography))
            .with_cert_resolver(Arc::new(AlwaysResolvesServerRawPublicKeys::new(
                Arc::clone(&self.key),
            )));
        Ok(ServerTls::new(config))
    }
}

/// Takes one public key and no other.
#[derive(Debug)]
struct Pinned {
    key: Vec<u8>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl Pinned {
    fn new(key: &[u8], cryptography: &CryptoProvider) -> Arc<Self> {
        Arc::new(Self {
            key: key.to_owned(),
            algorithms: cryptography.signature_verification_algorithms,
        })
    }

    fn check(&self, key: &CertificateDer<'_>) -> Result<(), rustls::Error> {
        match key.as_ref() == self.key {
            true => Ok(()),
            false => Err(CertificateError::ApplicationVerificationFailure.into()),
        }
    }

    fn signature(
        &self,
        message: &[u8],
        key: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let key = SubjectPublicKeyInfoDer::from(key.as_ref());
        rustls::crypto::verify_tls13_signature_with_raw_key(message, &key, signed, &self.algorithms)
    }
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        key: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.check(key)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(PeerIncompatible::Tls13RequiredForQuic.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        key: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.signature(message, key, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }

    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}

impl ClientCertVerifier for Pinned {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        key: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.check(key)?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(PeerIncompatible::Tls13RequiredForQuic.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        key: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.signature(message, key, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }

    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}
