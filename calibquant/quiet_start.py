"""Ends a script that is interrupted while it still imports torch, which takes seconds, without a traceback.

To be imported before anything else; :func:`calibquant.solver.script.run_script` takes over from there.
"""

import signal

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored, as under nohup
    signal.signal(signal.SIGINT, signal.SIG_DFL)
