"""Which step is safe?"""
