"""Owns sessions: ingests, orders, schedules, journals and delivers turns."""
