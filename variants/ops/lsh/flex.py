"""stub"""
class FlexRounds: pass
