"""Options: each is declared once; where its value comes from; how secrets stay hidden.

Promises that a mistake gives one line that names the option, and an exit code of the table.
"""
