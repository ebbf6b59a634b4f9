package sockdiag

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"time"
)

// The wire format: struct inet_diag_req_v2 and struct inet_diag_msg of include/uapi/linux/inet_diag.h,
// in the machine's byte order but for addresses and ports.
const (
	sockDiagByFamily = 20 // message type
	tcpDiagGetSock   = 18 // its predecessor, which can't name a family
	requestLen       = 56
	oldRequestLen    = 60
	replyLen         = 72
	idLen            = 48

	attrHeaderLen   = 4
	requestBytecode = 1 // attribute of a request

	attrInfo     = 2
	attrProtocol = 10
	attrV6Only   = 11
	attrCgroupID = 21

	noCookie = ^uint64(0)
)

var errMalformed = errors.New("malformed reply")

// appendRequest appends a request for sockets of the family.
func appendRequest(b []byte, family Family, states uint32, info bool, id ID) []byte {
	var ext byte
	if info {
		ext = 1 << (attrInfo - 1)
	}
	b = append(b, byte(family), byte(TCP), ext, 0)
	b = binary.NativeEndian.AppendUint32(b, states)
	b = binary.BigEndian.AppendUint16(b, id.Local.Port())
	b = binary.BigEndian.AppendUint16(b, id.Remote.Port())
	b = appendAddr(b, family, id.Local.Addr())
	b = appendAddr(b, family, id.Remote.Addr())
	b = binary.NativeEndian.AppendUint32(b, id.Interface)
	cookie := id.Cookie
	if cookie == 0 {
		cookie = noCookie
	}
	b = binary.NativeEndian.AppendUint32(b, uint32(cookie))
	return binary.NativeEndian.AppendUint32(b, uint32(cookie>>32))
}

// appendOldRequest appends a request for sockets of both families, which spares a second walk through the kernel's tables:
// struct inet_diag_req. The kernel answers it as it does the newer one.
func appendOldRequest(b []byte, states uint32, info bool) []byte {
	var ext byte
	if info {
		ext = 1 << (attrInfo - 1)
	}
	b = append(b, 0, 0, 0, ext)
	b = append(b, make([]byte, idLen)...)
	b = binary.NativeEndian.AppendUint32(b, states)
	return append(b, 0, 0, 0, 0) // tables to dump: obsolete
}

func appendAddr(b []byte, family Family, a netip.Addr) []byte {
	var field [16]byte
	switch {
	case !a.IsValid():
	case family == INET:
		v4 := a.Unmap().As4()
		copy(field[:], v4[:])
	default:
		field = a.As16()
	}
	return append(b, field[:]...)
}

// appendFilter appends a filter's bytecode as an attribute.
func appendFilter(b, code []byte) []byte {
	if len(code) == 0 {
		return b
	}
	b = binary.NativeEndian.AppendUint16(b, uint16(attrHeaderLen+len(code)))
	b = binary.NativeEndian.AppendUint16(b, requestBytecode)
	return append(b, code...) // a multiple of four bytes, so no padding
}

// parse reads one reply into s without allocating.
func parse(b []byte, s *Socket) error {
	if len(b) < replyLen {
		return errMalformed
	}
	u32 := binary.NativeEndian.Uint32
	*s = Socket{
		Family:      Family(b[0]),
		Protocol:    TCP,
		State:       State(b[1]),
		Timer:       Timer(b[2]),
		Retransmits: b[3],
		Interface:   u32(b[40:]),
		Cookie:      uint64(u32(b[44:])) | uint64(u32(b[48:]))<<32,
		Expires:     time.Duration(u32(b[52:])) * time.Millisecond,
		RecvQueue:   u32(b[56:]),
		SendQueue:   u32(b[60:]),
		UID:         u32(b[64:]),
		Inode:       u32(b[68:]),
	}
	switch s.Family {
	case INET:
		s.Local = netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[8:])), binary.BigEndian.Uint16(b[4:]))
		s.Remote = netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[24:])), binary.BigEndian.Uint16(b[6:]))
	case INET6:
		s.Local = netip.AddrPortFrom(netip.AddrFrom16([16]byte(b[8:])).Unmap(), binary.BigEndian.Uint16(b[4:]))
		s.Remote = netip.AddrPortFrom(netip.AddrFrom16([16]byte(b[24:])).Unmap(), binary.BigEndian.Uint16(b[6:]))
	default:
		return errMalformed
	}
	for b = b[replyLen:]; len(b) >= attrHeaderLen; {
		size := int(binary.NativeEndian.Uint16(b))
		kind := binary.NativeEndian.Uint16(b[2:])
		if size < attrHeaderLen || size > len(b) {
			return errMalformed
		}
		value := b[attrHeaderLen:size]
		switch kind {
		case attrInfo:
			if len(value) > 0 {
				s.Info, s.HasInfo = parseTCPInfo(value), true
			}
		case attrProtocol:
			if len(value) > 0 {
				s.Protocol = Protocol(value[0])
			}
		case attrV6Only:
			s.V6Only = len(value) > 0 && value[0] != 0
		case attrCgroupID:
			if len(value) >= 8 {
				s.CgroupID = binary.NativeEndian.Uint64(value)
			}
		}
		b = b[min(len(b), (size+3)&^3):]
	}
	return nil
}
