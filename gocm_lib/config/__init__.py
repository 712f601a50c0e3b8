"""Every option once, where its value comes from, and what must not be seen of it.

Promises that a mistake is one line that names the option, and ends in an exit code of the table.
"""
