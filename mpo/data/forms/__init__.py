"""Forms in which people have prompts and preference pairs.

:func:`form_of` recognises a row, and the form's ``read`` makes a :class:`PlainRow` of it; :func:`mpo.data.conversion.convert`
does so for files. The form of groups themselves is that of :mod:`mpo.data.contract`.
"""

from __future__ import annotations

from mpo.data.forms.readers import PlainRow
from mpo.data.forms.recognition import FORMS, Form, form_of

__all__ = ["FORMS", "Form", "PlainRow", "form_of"]
