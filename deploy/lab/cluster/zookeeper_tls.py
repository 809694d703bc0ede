"""What makes a ZooKeeper server take nobody without a certificate, neither clients nor other servers.

Debian's ZooKeeper is 3.8: who somebody is, is the subject of his certificate; TLS 1.3 alone does not start with the
suites that it chooses by itself; and a key store in PEM is one file, key and certificates together.
"""

from __future__ import annotations

import os
from pathlib import Path

_SUITES = "TLS_AES_256_GCM_SHA384,TLS_AES_128_GCM_SHA256,TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384"
JARS = ("netty-codec.jar", "netty-resolver.jar")
"""What TLS needs besides, and the manifest of Debian's zookeeper.jar does not name."""
KEY_STORE = "server.pem"
QUORUM_KEY_STORE = "quorum.pem"


def client_port(directory: Path, identity: Path, address: str, port: int) -> list[str]:
    """Lines of zoo.cfg, in place of `clientPort`. `directory`: where the key store is; `identity`: what it was made
    from."""
    return [
        f"secureClientPort={port}",
        f"secureClientPortAddress={address}",
        "serverCnxnFactory=org.apache.zookeeper.server.NettyServerCnxnFactory",
        "authProvider.x509=org.apache.zookeeper.server.auth.X509AuthenticationProvider",
        "ssl.clientAuth=need",
        "ssl.hostnameVerification=false",
        *_stores("ssl", directory / KEY_STORE, identity / "ca.pem"),
    ]


def quorum(directory: Path, identity: Path) -> list[str]:
    """Lines of zoo.cfg of an ensemble. Its servers have an authority of their own: any certificate that passes here is
    taken for a server's."""
    return [
        "sslQuorum=true",
        # Which server connects is said by the address, which the certificate has; a name would be looked up.
        "ssl.quorum.hostnameVerification=false",
        *_stores("ssl.quorum", directory / QUORUM_KEY_STORE, identity / "ca.pem"),
    ]


def _stores(prefix: str, keys: Path, trusted: Path) -> list[str]:
    return [
        f"{prefix}.keyStore.location={keys}",
        f"{prefix}.keyStore.type=PEM",
        f"{prefix}.trustStore.location={trusted}",
        f"{prefix}.trustStore.type=PEM",
        f"{prefix}.protocol=TLSv1.3",
        f"{prefix}.enabledProtocols=TLSv1.3,TLSv1.2",
        f"{prefix}.ciphersuites={_SUITES}",
    ]


def write_key_store(directory: Path, identity: Path, name: str = KEY_STORE) -> None:
    """Key and certificates of the identity as the server reads them, for its owner alone. Raises OSError."""
    content = (identity / "key.pem").read_bytes() + (identity / "cert.pem").read_bytes()
    path = directory / name
    made = path.with_suffix(".new")
    made.unlink(missing_ok=True)
    with os.fdopen(os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
    made.replace(path)
