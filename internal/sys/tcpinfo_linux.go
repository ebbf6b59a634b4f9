package sys

import (
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// TCPEstablished is the state of a connection that neither end has closed.
const TCPEstablished = unix.BPF_TCP_ESTABLISHED

// TCPInfo is the part of TCP_INFO that tells whether something is in flight on a connection.
type TCPInfo struct {
	State                          uint8
	BytesReceived                  uint64
	BytesSent                      uint64        // without retransmissions
	LastDataSent, LastDataReceived time.Duration // ago, in ticks of the kernel's clock
}

// tcpInfo reads TCP_INFO of a TCP socket.
func tcpInfo(fd int) (TCPInfo, error) {
	info, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
	if err != nil {
		return TCPInfo{}, os.NewSyscallError("getsockopt TCP_INFO", err)
	}
	return TCPInfo{
		State:            info.State,
		BytesReceived:    info.Bytes_received,
		BytesSent:        info.Bytes_sent - info.Bytes_retrans,
		LastDataSent:     time.Duration(info.Last_data_sent) * time.Millisecond,
		LastDataReceived: time.Duration(info.Last_data_recv) * time.Millisecond,
	}, nil
}
