"""What can go wrong on the way to a device and on it, provoked against a real sshd."""

from __future__ import annotations

