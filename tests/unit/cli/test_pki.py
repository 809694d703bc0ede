"""`drover pki` on real directories."""

from __future__ import annotations

import json
import stat
from pathlib import Path

from tests.unit.cli.ran import Drover


def test_from_an_authority_to_a_revoked_certificate(local: Drover, tmp_path: Path) -> None:
    assert local("pki", "init", "blue").code == 0
    assert local("pki", "issue", "host/h1", "--ip", "10.0.0.1", "--dns", "h1.example").code == 0
    held = tmp_path / "pki" / "host" / "h1"
    assert stat.S_IMODE(held.stat().st_mode) == 0o700
    assert {each.name for each in held.iterdir()} == {"ca.pem", "cert.pem", "key.pem", "deny.json"}
    assert all(stat.S_IMODE(each.stat().st_mode) == 0o600 for each in held.iterdir())
    first = json.loads(local("pki", "show", str(held), "-o", "json").out)
    assert first["identity"] == "spiffe://drover/blue/host/h1"
    assert first["problems"] == []
    key = (held / "key.pem").read_bytes()

    assert local("pki", "renew", str(held)).code == 0
    second = json.loads(local("pki", "show", str(held), "-o", "json").out)
    assert second["serial"] != first["serial"]
    assert (held / "key.pem").read_bytes() != key

    assert local("pki", "revoke", first["serial"]).code == 0
    assert local("pki", "show", str(held)).code == 0, "the renewed one is not the revoked one"
    assert local("pki", "revoke", "host/h1", "--to", str(held)).code == 0
    shown = local("pki", "show", str(held))
    assert shown.code == 1
    assert "it is revoked" in shown.err
    refused = local("pki", "renew", str(held))
    assert refused.code == 2
    assert "is revoked" in refused.err
    listed = json.loads(local("pki", "show", "-o", "json").out)["certificates"]
    assert {each["serial"]: each["revoked"] for each in listed} == {first["serial"]: True, second["serial"]: True}


def test_wrong_input_changes_nothing(local: Drover, tmp_path: Path) -> None:
    assert local("pki", "issue", "host/h1").code == 2
    assert local("pki", "init", "Not A Name").code == 2
    assert not (tmp_path / "pki").exists()
    assert local("pki", "init", "blue").code == 0
    before = (tmp_path / "pki/ca/ca.key").read_bytes()
    assert local("pki", "init", "green").code == 2
    assert (tmp_path / "pki/ca/ca.key").read_bytes() == before
    for wrong in ("host/", "role/root", "host/../ca", "h1"):
        assert local("pki", "issue", wrong).code == 2, wrong
    assert local("pki", "issue", "host/h1", "--hours", "0").code == 2
    assert local("pki", "issue", "host/h1", "--ip", "nowhere").code == 2
    assert local("pki", "revoke", "host/h9").code == 3
    assert local("pki", "revoke", "xyz").code == 2
    assert not (tmp_path / "pki/host").exists()
    assert not (tmp_path / "pki/ca/deny.json").exists()
