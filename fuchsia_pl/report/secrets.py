"""Which settings may be secret, by their names and by the look of their values."""

import re

# Under environment, engine and loggers, whose settings may be anything. Elsewhere names such as `max_completion_tokens` are ours.
SECRET_NAME = re.compile(r"key|token(?!s|_ids)|secret|passw|credential|auth|cookie|header", re.IGNORECASE)
# User and password in an address, and the beginnings of common keys.
SECRET_TEXT = re.compile(
    r"://[^/\s]*@|\b(sk|pk|hf|ghp|gho|glpat|xox[abp]|AKIA)[-_]?[A-Za-z0-9]{8}|-----BEGIN|\bBearer\s"
)
