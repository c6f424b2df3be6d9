"""The nine patterns of the rules task: which columns each applies to, and the rule it makes of them."""

from __future__ import annotations

import dataclasses

SEVERITIES = ("low", "medium", "high", "critical")

SENSITIVE = frozenset(
    "email phone password secret token credential credentials key account amount price cost balance tax salary "
    "payment birth ssn "
    "address city owner contact customer iban card user username".split()
)


@dataclasses.dataclass(frozen=True)
class RuleKind:
    """One rule type of a pattern: the column words that select it (none: every column), and its fields."""

    rule_type: str
    words: frozenset[str]
    severity: str
    description: str
    where: str


@dataclasses.dataclass(frozen=True)
class Pattern:
    """A pattern: its rule types, most specific first."""

    kinds: tuple[RuleKind, ...]

    def kind_of(self, column: str) -> RuleKind | None:
        """Return the first rule type with a word of `column`, or None when the pattern does not apply to it."""
        words = set(column.split("_"))
        return next((kind for kind in self.kinds if not kind.words or words & kind.words), None)


def is_sensitive(column: str) -> bool:
    """Return whether a column's name tells of secret, personal or financial content."""
    return not SENSITIVE.isdisjoint(column.split("_"))


def raised(severity: str) -> str:
    """Return the next higher severity, `critical` staying what it is."""
    return SEVERITIES[min(SEVERITIES.index(severity) + 1, len(SEVERITIES) - 1)]


def _kind(rule_type: str, words: str, severity: str, description: str, where: str) -> RuleKind:
    return RuleKind(
        rule_type=rule_type, words=frozenset(words.split()), severity=severity, description=description, where=where
    )


PATTERNS: dict[str, Pattern] = {
    "pattern_match": Pattern(
        (
            _kind(
                "contact_format",
                "email phone address url uri link endpoint",
                "medium",
                "Malformed {column} in {table}.",
                "{column} NOT LIKE '%_@_%' AND {column} NOT LIKE '%://%'",
            ),
            _kind(
                "identifier_format",
                "id ids identifier uid uuid arn key number code",
                "medium",
                "Malformed {column} in {table}.",
                "{column} LIKE '% %' OR LENGTH({column}) < 2",
            ),
            _kind(
                "text_format",
                "name title description label type version",
                "low",
                "Padded {column} in {table}.",
                "{column} <> TRIM({column})",
            ),
        )
    ),
    "missing_fields": Pattern(
        (
            _kind(
                "missing_identifier",
                "id ids identifier uid uuid arn key",
                "high",
                "Record of {table} without {column}.",
                "{column} IS NULL",
            ),
            _kind(
                "missing_date",
                "date time at timestamp created updated modified",
                "medium",
                "Record of {table} without {column}.",
                "{column} IS NULL",
            ),
            _kind(
                "missing_value", "", "low", "Record of {table} without {column}.", "{column} IS NULL OR {column} = ''"
            ),
        )
    ),
    "date_staleness": Pattern(
        (
            _kind(
                "expired_record",
                "expire expires expiry expiration end due until",
                "high",
                "{column} of {table} has passed.",
                "{column} < CURRENT_DATE",
            ),
            _kind(
                "stale_record",
                "update updated modified last refresh sync",
                "medium",
                "{table} not changed for 90 days by {column}.",
                "{column} < CURRENT_DATE - INTERVAL '90 days'",
            ),
            _kind(
                "aged_record",
                "date time at timestamp created creation",
                "low",
                "{table} older than a year by {column}.",
                "{column} < CURRENT_DATE - INTERVAL '365 days'",
            ),
        )
    ),
    "status_anomaly": Pattern(
        (
            _kind(
                "failure_reported",
                "error failure failed reason message",
                "high",
                "{table} reports a failure in {column}.",
                "{column} IS NOT NULL",
            ),
            _kind(
                "unexpected_status",
                "status state stage phase result",
                "medium",
                "Unexpected {column} in {table}.",
                "{column} NOT IN ('ACTIVE', 'COMPLETED')",
            ),
        )
    ),
    "configuration": Pattern(
        (
            _kind(
                "feature_flag",
                "enabled disabled is has enable disable allow active",
                "medium",
                "{column} of {table} is not set.",
                "{column} IS NULL OR {column} = FALSE",
            ),
            _kind(
                "setting_drift",
                "mode type version configuration config settings region size format class tier",
                "low",
                "{column} of {table} differs from its default.",
                "{column} <> 'DEFAULT'",
            ),
        )
    ),
    "access_control": Pattern(
        (
            _kind(
                "public_access",
                "public access visibility sharing shared policy permission permissions",
                "high",
                "{table} is open through {column}.",
                "{column} = 'PUBLIC'",
            ),
            _kind(
                "role_assignment",
                "role roles principal group admin",
                "medium",
                "Broad {column} in {table}.",
                "{column} LIKE '%admin%'",
            ),
            _kind(
                "ownership",
                "owner user by account creator customer project domain",
                "low",
                "{table} has no valid {column}.",
                "{column} IS NULL",
            ),
        )
    ),
    "severity_threshold": Pattern(
        (
            _kind(
                "risk_level",
                "severity priority risk level score",
                "high",
                "{column} of {table} is above the limit.",
                "{column} >= 4",
            ),
            _kind(
                "amount_limit",
                "amount price cost total fee balance quantity rate percentage",
                "medium",
                "{column} of {table} is above the limit.",
                "{column} > 1000",
            ),
            _kind(
                "volume_limit",
                "count size bytes num number duration seconds minutes length max limit capacity",
                "low",
                "{column} of {table} is above the limit.",
                "{column} > 100",
            ),
        )
    ),
    "authentication": Pattern(
        (
            _kind(
                "credential_exposed",
                "token secret password key credential credentials",
                "critical",
                "{table} shows a credential in {column}.",
                "{column} IS NOT NULL",
            ),
            _kind(
                "unknown_identity",
                "user by owner account username email creator principal",
                "high",
                "{table} changed by an unknown {column}.",
                "{column} IS NULL OR {column} = 'anonymous'",
            ),
            _kind(
                "unverified_source",
                "source provider client domain ip endpoint arn",
                "medium",
                "{table} from an unverified {column}.",
                "{column} NOT LIKE 'trusted%'",
            ),
        )
    ),
    "encryption": Pattern(
        (
            _kind(
                "key_management",
                "kms encryption encrypted key certificate ssl tls cipher",
                "high",
                "{table} is not protected by {column}.",
                "{column} IS NULL",
            ),
            _kind(
                "plaintext_personal",
                "email phone address name user owner contact account customer",
                "high",
                "{column} of {table} is stored unencrypted.",
                "{column} NOT LIKE 'enc:%'",
            ),
            _kind(
                "plaintext_transport",
                "url uri endpoint link location path",
                "low",
                "{column} of {table} is not encrypted in transit.",
                "{column} LIKE 'http://%'",
            ),
        )
    ),
}
