"""Method and path of every call, used by the server to mount and by the client to call.

A path starts with a slash; the base URL given by the user has none at its end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Route:
    """One call of the wire contract."""

    method: str
    path: str

    def fill(self, **parts: str) -> str:
        """Put values into the path; KeyError when one is missing."""
        return self.path.format(**parts)


LIVE: Final = Route("GET", "/health/live")
READY: Final = Route("GET", "/health/ready")
AUTHORITY: Final = Route("GET", "/v1/authority")
ENROL: Final = Route("POST", "/v1/clients")
CHALLENGE: Final = Route("POST", "/v1/challenges")
SESSION: Final = Route("POST", "/v1/sessions")
CLIENT_STATUS: Final = Route("GET", "/v1/clients/me")
REJOIN: Final = Route("PUT", "/v1/clients/me")
LEAVE: Final = Route("DELETE", "/v1/clients/me")
CHANGE_KEY: Final = Route("PUT", "/v1/clients/me/key")
OFFLINE: Final = Route("POST", "/v1/clients/me/offline")
HEARTBEAT: Final = Route("POST", "/v1/clients/me/heartbeat")
CALIBRATE: Final = Route("PUT", "/v1/clients/me/calibration")
ASSIGNMENT: Final = Route("GET", "/v1/assignment")
FAILURE: Final = Route("POST", "/v1/assignments/{assignment_id}/failure")
MODEL: Final = Route("GET", "/v1/models/{model_id}")
BLOB: Final = Route("GET", "/v1/blobs/{sha256}")
BLOBS: Final = Route("GET", "/v1/blobs")
EVALUATION: Final = Route("POST", "/v1/evaluations")
UPLOAD_CREATE: Final = Route("POST", "/v1/uploads")
UPLOAD_WHOLE: Final = Route("POST", "/v1/uploads/whole")
UPLOAD_OFFSET: Final = Route("HEAD", "/v1/uploads/{upload_id}")
UPLOAD_APPEND: Final = Route("PATCH", "/v1/uploads/{upload_id}")
OPERATOR_RUNS: Final = Route("GET", "/v1/operator/runs")
OPERATOR_RUN: Final = Route("GET", "/v1/operator/runs/{run}")
OPERATOR_STEER: Final = Route("POST", "/v1/operator/runs/{run}/{step}")
OPERATOR_CLIENTS: Final = Route("GET", "/v1/operator/clients")
OPERATOR_REMOVE_CLIENT: Final = Route("DELETE", "/v1/operator/clients/{client_id}")
OPERATOR_JOURNAL: Final = Route("GET", "/v1/operator/journal")
OPERATOR_QUARANTINE: Final = Route("GET", "/v1/operator/quarantine")
OPERATOR_TOKENS: Final = Route("GET", "/v1/operator/tokens")
OPERATOR_CREATE_TOKEN: Final = Route("POST", "/v1/operator/tokens")
OPERATOR_REVOKE_TOKEN: Final = Route("DELETE", "/v1/operator/tokens/{token_id}")
METRICS: Final = Route("GET", "/metrics")

UPLOAD_OFFSET_HEADER: Final = "Upload-Offset"
UPLOAD_COMPLETE_HEADER: Final = "Upload-Complete"
UPLOAD_LENGTH_HEADER: Final = "Upload-Length"
DIGEST_HEADER: Final = "Repr-Digest"
MANIFEST_LENGTH_HEADER: Final = "Manifest-Length"
MAX_POLL_S: Final = 30.0
"""The longest a client may ask the server to hold an assignment request open, in seconds."""
