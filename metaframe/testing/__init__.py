"""Tests of meta-learning code: the backend matrix for pytest, assertions, the gradient doctor.

`metaframe.testing.conformance` tests backends themselves.
"""

from metaframe.testing.assertions import assert_backends_agree as assert_backends_agree
from metaframe.testing.assertions import assert_compiled_once as assert_compiled_once
from metaframe.testing.assertions import assert_meta_gradient as assert_meta_gradient
from metaframe.testing.assertions import assert_no_leak as assert_no_leak
from metaframe.testing.doctor import check_meta_gradient as check_meta_gradient
from metaframe.testing.report import Finding as Finding
from metaframe.testing.report import Report as Report
from metaframe.testing.subject import Adaptation as Adaptation
