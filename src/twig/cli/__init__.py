"""Defines the command line: one file per command, what commands share, and the display.

A command parses its arguments, makes one library call and shows the result. Nothing else in Twig imports this
package. Heavy imports stand inside the commands.
"""
