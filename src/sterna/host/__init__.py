"""The computer that this program runs on: its limits and load, names and addresses, files that users name, other processes.

Imports nothing else of sterna.
"""
