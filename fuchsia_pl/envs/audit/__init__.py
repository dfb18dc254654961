"""Audit of rewards: texts that a policy may write are scored in limited processes, and the scores are judged."""

from fuchsia_pl.envs.audit.findings import Finding, FindingKind
from fuchsia_pl.envs.audit.runner import Audited, AuditSettings, audit, refuse_unsound
from fuchsia_pl.envs.audit.task import AuditItem, AuditTask

__all__ = [
    "AuditItem",
    "AuditSettings",
    "AuditTask",
    "Audited",
    "Finding",
    "FindingKind",
    "audit",
    "refuse_unsound",
]
