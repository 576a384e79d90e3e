"""How long a busy server asks to be left alone, for the clients of samplers and of judges."""

import datetime
import email.utils
import math


def retry_after_seconds(header: str | None) -> float | None:
    """Read a Retry-After header, seconds or a date (RFC 9110, 10.2.3) -> seconds from now, 0 or more; None: no wish."""
    value = (header or "").strip()
    try:
        seconds = float(value)
    except ValueError:
        try:
            moment = email.utils.parsedate_to_datetime(value)
        except ValueError:
            return None
        seconds = (moment - datetime.datetime.now(moment.tzinfo)).total_seconds()
    return max(seconds, 0.0) if math.isfinite(seconds) else None
