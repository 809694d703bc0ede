"""The authority and what it signs: names, files, deny list, and certificates that somebody else made."""

from __future__ import annotations

import json
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from orchestrator.pki import files
from orchestrator.pki.authority import Authority, make_request
from orchestrator.pki.files import PkiError
from orchestrator.pki.names import BadName, Identity, Kind, of_host, of_role, read_short, read_uri

NOW = datetime(2026, 5, 1, 12, 0, tzinfo=UTC)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.create(tmp_path / "ca", "blue", NOW)


@pytest.mark.parametrize(
    ("identity", "uri", "subject", "server"),
    [
        (of_host("blue", "h1"), "spiffe://drover/blue/host/h1", "CN=h1,OU=host,O=blue", "h1.host.blue.drover"),
        (of_role("blue", "api"), "spiffe://drover/blue/role/api", "CN=api,OU=role,O=blue", "api.role.blue.drover"),
        (
            of_role("blue", "operator", "alice"),
            "spiffe://drover/blue/role/operator/alice",
            "CN=operator,OU=role,O=blue",
            "operator.role.blue.drover",
        ),
    ],
)
def test_an_identity_is_spelt_for_each_reader(identity: Identity, uri: str, subject: str, server: str) -> None:
    assert (identity.uri, identity.subject, identity.server_name) == (uri, subject, server)
    assert read_uri(uri) == identity
    assert read_short("blue", str(identity)) == identity


@pytest.mark.parametrize(
    "uri",
    [
        "https://drover/blue/host/h1",
        "spiffe://drover/blue/host",
        "spiffe://drover/blue/host/",
        "spiffe://drover/blue/host/h1/alice",
        "spiffe://drover/blue/host/h1/role/admin",
        "spiffe://drover/blue/role/root",
        "spiffe://drover/blue/role/admin/",
        "spiffe://drover/Blue/role/admin",
        "spiffe://drover//role/admin",
        "spiffe://drover/blue/host/a,OU=role",
        "spiffe://drover/blue/host/../role",
        "",
    ],
)
def test_what_is_no_identity_is_refused(uri: str) -> None:
    with pytest.raises(BadName):
        read_uri(uri)


def test_a_host_is_never_taken_for_a_role() -> None:
    """Host names are the operators' own: none may end as a name that a role's certificate is good for."""
    assert of_host("blue", "api").server_name != of_role("blue", "api").server_name
    assert of_host("blue", "api.role").server_name != of_role("blue", "api").server_name
    with pytest.raises(BadName):
        Identity("blue", Kind.HOST, "h1", "alice")


def test_what_is_issued_says_who_it_is_and_lies_where_nobody_else_reads(authority: Authority, tmp_path: Path) -> None:
    mine = tmp_path / "host" / "h1"
    issued = authority.issue(of_host("blue", "h1"), mine, NOW, ips=["10.0.0.7"], dns=["h1.example"])
    shown = files.show(mine, NOW)
    assert (shown.identity, shown.serial, shown.problems) == (of_host("blue", "h1"), issued.serial, ())
    assert shown.not_after - NOW == timedelta(hours=24)
    assert stat.S_IMODE(mine.stat().st_mode) == 0o700
    assert {stat.S_IMODE(each.stat().st_mode) for each in mine.iterdir()} == {0o600}
    assert stat.S_IMODE(authority.directory.stat().st_mode) == 0o700
    assert {stat.S_IMODE(each.stat().st_mode) for each in authority.directory.iterdir()} == {0o600}
    assert [each.uri for each in authority.issued(NOW)] == ["spiffe://drover/blue/host/h1"]
    assert authority.issued(NOW + timedelta(days=2)) == []
    cert = x509.load_pem_x509_certificate((mine / "cert.pem").read_bytes())
    assert cert.subject.rfc4514_string() == of_host("blue", "h1").subject


def test_who_keeps_his_key_gets_a_certificate_for_it(authority: Authority) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    cert = authority.sign(make_request(key), of_host("blue", "h2"), NOW)
    assert files.identity_of(cert) == of_host("blue", "h2")
    assert x509.load_pem_x509_certificate(cert).public_key() == key.public_key()
    with pytest.raises(PkiError, match="no request"):
        authority.sign(b"nonsense", of_host("blue", "h2"), NOW)


def test_a_revoked_certificate_is_named_and_denied(authority: Authority, tmp_path: Path) -> None:
    mine = tmp_path / "h1"
    issued = authority.issue(of_host("blue", "h1"), mine, NOW)
    assert authority.revoke([issued.serial]) == {issued.serial}
    assert [each.revoked for each in authority.issued(NOW)] == [True]
    files.write_denied(mine, files.denied(authority.directory))
    assert "it is revoked: issue a new one" in files.show(mine, NOW).problems
    again = authority.issue(of_host("blue", "h1"), mine, NOW)
    assert files.denied(mine) == {issued.serial}
    assert files.show(mine, NOW).serial == again.serial


def test_a_deny_list_that_cannot_be_read_is_not_an_empty_one(tmp_path: Path) -> None:
    assert files.denied(tmp_path) == frozenset()
    for text in ("", "[]", '{"serials": 3}', "{"):
        (tmp_path / "deny.json").write_text(text)
        with pytest.raises(PkiError, match="no deny list"):
            files.denied(tmp_path)


def test_problems_are_named(authority: Authority, tmp_path: Path) -> None:
    mine, other = tmp_path / "h1", tmp_path / "h2"
    authority.issue(of_host("blue", "h1"), mine, NOW)
    assert "ended at 2026-05-02" in files.show(mine, NOW + timedelta(days=2)).problems[0]
    assert "begins at" in files.show(mine, NOW - timedelta(days=1)).problems[0]
    authority.issue(of_host("blue", "h2"), other, NOW)
    (mine / "key.pem").write_bytes((other / "key.pem").read_bytes())
    assert any("not the key" in each for each in files.show(mine, NOW).problems)
    stranger = Authority.create(tmp_path / "ca2", "blue", NOW)
    (other / "ca.pem").write_bytes(stranger.ca)
    assert any("has signed it" in each for each in files.show(other, NOW).problems)
    (other / "key.pem").chmod(0o644)
    assert any("others may read" in each for each in files.show(other, NOW).problems)


def test_what_is_no_certificate_of_ours_is_refused(authority: Authority, tmp_path: Path) -> None:
    mine = tmp_path / "h1"
    with pytest.raises(PkiError, match="drover pki issue"):
        files.show(mine, NOW)
    authority.issue(of_host("blue", "h1"), mine, NOW)
    (mine / "cert.pem").write_bytes(authority.ca)
    with pytest.raises(PkiError, match="must carry one URI"):
        files.show(mine, NOW)
    (mine / "cert.pem").write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    with pytest.raises(PkiError, match="no certificate"):
        files.show(mine, NOW)


def test_an_authority_is_made_once_and_signs_for_its_own_cluster(authority: Authority, tmp_path: Path) -> None:
    with pytest.raises(PkiError, match="already"):
        Authority.create(authority.directory, "blue", NOW)
    with pytest.raises(PkiError, match="authority of blue"):
        authority.issue(of_host("red", "h1"), tmp_path / "h1", NOW)
    with pytest.raises(PkiError, match="hours"):
        authority.issue(of_host("blue", "h1"), tmp_path / "h1", NOW, hours=0)
    with pytest.raises(BadName):
        Authority.create(tmp_path / "bad", "Not A Cluster", NOW)
    assert not (tmp_path / "bad").exists()
    with pytest.raises(PkiError, match="drover pki init"):
        Authority(tmp_path / "none")
    with pytest.raises(PkiError, match="authority itself has ended"):
        authority.issue(of_host("blue", "h1"), tmp_path / "h1", NOW + timedelta(days=4000))


def test_a_leaf_never_outlives_its_authority(tmp_path: Path) -> None:
    short = Authority.create(tmp_path / "ca", "blue", NOW, days=1)
    issued = short.issue(of_host("blue", "h1"), tmp_path / "h1", NOW, hours=100)
    assert datetime.fromisoformat(issued.not_after) == NOW + timedelta(days=1)


def test_authorities_side_by_side_forget_nothing(authority: Authority, tmp_path: Path) -> None:
    second = Authority(authority.directory)
    for number in range(6):
        (authority, second)[number % 2].issue(of_host("blue", f"h{number}"), tmp_path / f"h{number}", NOW)
    assert len(second.issued(NOW)) == 6
    assert len(json.loads((authority.directory / "issued.json").read_text())) == 6


def test_a_renewed_certificate_has_the_names_of_the_old_one(authority: Authority, tmp_path: Path) -> None:
    held = tmp_path / "h1"
    authority.issue(of_host("blue", "h1"), held, NOW, dns=["h1.example"], ips=["10.0.0.1"])
    names = files.other_names(held)
    assert names == (["h1.example"], ["10.0.0.1"])
    late = NOW + timedelta(days=3)
    assert files.show(held, late).problems
    authority.renew(held, late)
    assert files.other_names(held) == names
    assert not files.show(held, late).problems
