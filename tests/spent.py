"""A command in a process of its own, and the processor seconds that it took."""

import os
import subprocess
import tempfile


def spent(*command):
    """Runs the command -> its exit code, standard output, standard error, and the seconds of it and of those it waited for.

    What all children together have used would hold those too whose end an earlier test left to be seen.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        return process.returncode, out.read(), err.read(), used.ru_utime + used.ru_stime
