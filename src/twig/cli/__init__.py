"""The command line: one file per command, what they share, and what a person sees.

A command reads its words, makes one library call and shows the result. Nothing else in Twig imports this
package. Heavy imports stand inside the commands.
"""
