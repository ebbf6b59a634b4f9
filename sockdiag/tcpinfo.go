package sockdiag

import (
	"encoding/binary"
	"time"
)

// TCPInfo is what berth needs of the kernel's struct tcp_info. A field that the kernel is too old for is 0.
type TCPInfo struct {
	State State

	// Unacked is the number of segments sent and not acknowledged; of a listener, the connections that wait for accept.
	Unacked uint32
	// Unsent is the number of bytes that the program has written and TCP hasn't sent yet.
	Unsent uint32

	// Time since the last event, in ticks of the kernel's clock (1, 4 or 10 ms).
	LastDataSent, LastDataReceived, LastAckReceived time.Duration

	BytesReceived uint64 // in order, the peer's FIN included
	BytesAcked    uint64 // the SYN and FIN included
	BytesSent     uint64 // retransmissions included
	BytesRetrans  uint64

	SegsIn, SegsOut         uint32 // retransmissions included
	DataSegsIn, DataSegsOut uint32 // of these, the ones with payload

	SendMSS uint32
	RTT     time.Duration // smoothed
}

// Offsets in struct tcp_info, include/uapi/linux/tcp.h.
const (
	infoState         = 0
	infoSendMSS       = 16
	infoUnacked       = 24
	infoLastDataSent  = 44
	infoLastDataRecv  = 52
	infoLastAckRecv   = 56
	infoRTT           = 68
	infoBytesAcked    = 120
	infoBytesReceived = 128
	infoSegsOut       = 136
	infoSegsIn        = 140
	infoNotsent       = 144
	infoDataSegsIn    = 152
	infoDataSegsOut   = 156
	infoBytesSent     = 200
	infoBytesRetrans  = 208
)

// parseTCPInfo reads struct tcp_info, which has grown at its end with the kernel's versions.
func parseTCPInfo(b []byte) TCPInfo {
	u32 := func(at int) uint32 {
		if len(b) < at+4 {
			return 0
		}
		return binary.NativeEndian.Uint32(b[at:])
	}
	u64 := func(at int) uint64 {
		if len(b) < at+8 {
			return 0
		}
		return binary.NativeEndian.Uint64(b[at:])
	}
	ms := func(at int) time.Duration { return time.Duration(u32(at)) * time.Millisecond }
	info := TCPInfo{
		SendMSS:          u32(infoSendMSS),
		Unacked:          u32(infoUnacked),
		LastDataSent:     ms(infoLastDataSent),
		LastDataReceived: ms(infoLastDataRecv),
		LastAckReceived:  ms(infoLastAckRecv),
		RTT:              time.Duration(u32(infoRTT)) * time.Microsecond,
		BytesAcked:       u64(infoBytesAcked),
		BytesReceived:    u64(infoBytesReceived),
		SegsOut:          u32(infoSegsOut),
		SegsIn:           u32(infoSegsIn),
		Unsent:           u32(infoNotsent),
		DataSegsIn:       u32(infoDataSegsIn),
		DataSegsOut:      u32(infoDataSegsOut),
		BytesSent:        u64(infoBytesSent),
		BytesRetrans:     u64(infoBytesRetrans),
	}
	if len(b) > infoState {
		info.State = State(b[infoState])
	}
	return info
}
