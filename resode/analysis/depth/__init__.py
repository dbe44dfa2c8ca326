"""What does each block of a network do?"""
